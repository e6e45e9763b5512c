# SPDX-License-Identifier: Apache-2.0
"""A build that lacks something fails with one sentence on what to install."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A compiler that reads everything but one header.
COMPILER = """#!/bin/sh
case "$*" in
*"-E -x"*) text=$(cat); case "$text" in *{header}*) exit 1;; esac
           printf '%s\\n' "$text" | exec gcc "$@";;
esac
exec gcc "$@"
"""

# setup.py where torch cannot be found.
NO_TORCH = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
runpy.run_path("setup.py", run_name="__main__")
"""

# setup.py with the CUDA library as the only extension.
CUDA_ALONE = """
import runpy, setuptools
whole = setuptools.setup
def alone(ext_modules, **named):
    whole(ext_modules=[ext for ext in ext_modules if "cuda" in ext.name], **named)
setuptools.setup = alone
runpy.run_path("setup.py", run_name="__main__")
"""

# A compiler for devices that compiles nothing.
NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.0" ;;
--list-gpu-arch) echo compute_90 ;;
*) exit 1 ;;
esac
"""

# setup.py where nvcc cannot be found.
NO_NVCC = """
import runpy, shutil
which = shutil.which
shutil.which = lambda name, **named: None if name == "nvcc" else which(name, **named)
runpy.run_path("setup.py")
"""


def build(folder: Path, *program: str, compiler: str = "gcc", **environment: str) -> str:
    """Start a build that stops before it compiles; the last line it writes."""
    done = subprocess.run(
        [sys.executable, *program, "-q", "build_ext", f"--build-temp={folder}/temp"]
        + [f"--build-lib={folder}/lib"],
        cwd=ROOT,
        env={**os.environ, "CC": compiler, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert not (folder / "temp").exists()
    return done.stderr.splitlines()[-1]


def test_a_missing_compiler_is_one_sentence(tmp_path: Path) -> None:
    assert build(tmp_path, "setup.py", compiler="no-such-compiler") == (
        "error: deepspeed-autotp needs a C compiler (no-such-compiler) to build: "
        "apt-get install build-essential (Debian, Ubuntu) or dnf install gcc gcc-c++ (Fedora)"
    )


@pytest.mark.parametrize(
    ("header", "what", "debian", "fedora"),
    [
        ("<pcre2.h>", "the PCRE2 headers", "libpcre2-dev", "pcre2-devel"),
        ("<Python.h>", "Python's headers", "python3-dev", "python3-devel"),
        ("<string>", "a C++ compiler", "build-essential", "gcc gcc-c++"),
    ],
)
def test_a_missing_header_is_one_sentence(
    tmp_path: Path, header: str, what: str, debian: str, fedora: str
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(COMPILER.format(header=f"'{header}'"))
    compiler.chmod(0o755)
    assert build(tmp_path, "setup.py", compiler=str(compiler)) == (
        f"error: deepspeed-autotp needs {what} to build: "
        f"apt-get install {debian} (Debian, Ubuntu) or dnf install {fedora} (Fedora)"
    )


def test_a_missing_torch_is_one_sentence(tmp_path: Path) -> None:
    assert build(tmp_path, "-c", NO_TORCH) == (
        "error: deepspeed-autotp needs PyTorch 2.10 or later to build: "
        "pip install 'torch>=2.10,<2.14', then pip install --no-build-isolation ."
    )


def test_a_wrong_switch_for_cuda_is_one_sentence(tmp_path: Path) -> None:
    assert build(tmp_path, "setup.py", AUTOTP_CUDA="yes") == (
        "error: AUTOTP_CUDA is 'yes', expected auto, 1 or 0"
    )


def test_a_wanted_library_without_nvcc_is_one_sentence(tmp_path: Path) -> None:
    assert build(tmp_path, "-c", NO_NVCC, AUTOTP_CUDA="1") == (
        "error: deepspeed-autotp needs nvcc 12.1 or later to build: put it in PATH or its folder "
        "in CUDA_HOME, or set AUTOTP_CUDA=auto"
    )


def fake_nvcc(folder: Path, release: str) -> dict[str, str]:
    """The environment in which there is an nvcc that cannot compile."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC.format(release=release))
    nvcc.chmod(0o755)
    return {"PATH": f"{nvcc.parent}:{os.environ['PATH']}", "AUTOTP_CUDA_ARCHS": ""}


@pytest.mark.parametrize(
    ("release", "reason"),
    [("11.8", "needs nvcc 12.1 or later"), ("12.1", "failed with exit code 1")],
)
def test_an_nvcc_of_no_use_is_a_warning_and_leaves_no_old_library(
    tmp_path: Path, release: str, reason: str
) -> None:
    old = tmp_path / "lib" / "deepspeed_autotp" / "libautotp_cuda.so"
    old.parent.mkdir(parents=True)
    old.touch()
    done = subprocess.run(
        [sys.executable, "-c", CUDA_ALONE, "-q", "build_ext"]
        + [f"--build-temp={tmp_path}/temp", f"--build-lib={tmp_path}/lib"],
        cwd=ROOT,
        env={**os.environ, **fake_nvcc(tmp_path, release), "AUTOTP_CUDA": "auto"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("AUTOTP_CUDA=0 builds without it") == 1 and reason in done.stderr
    assert not old.exists()


def test_a_wanted_library_with_an_old_nvcc_is_one_sentence(tmp_path: Path) -> None:
    environment = fake_nvcc(tmp_path, "11.8")
    said = build(tmp_path, "setup.py", **environment, AUTOTP_CUDA="1")
    assert said == (
        f"error: deepspeed-autotp needs nvcc 12.1 or later to build: {tmp_path}/bin/nvcc is 11.8; "
        "put it in PATH or its folder in CUDA_HOME, or set AUTOTP_CUDA=auto"
    )


@pytest.mark.skipif(
    shutil.which("nvcc", path=os.environ["PATH"] + ":/usr/local/cuda/bin") is None,
    reason="there is no nvcc",
)
def test_an_architecture_that_nvcc_does_not_know_is_one_sentence(tmp_path: Path) -> None:
    said = build(tmp_path, "setup.py", AUTOTP_CUDA="1", AUTOTP_CUDA_ARCHS="80,7")
    assert said.startswith("error: AUTOTP_CUDA_ARCHS: ")
    assert " cannot compile for 7; expected some of " in said


def test_a_source_distribution_has_all_files_of_the_repository(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={tmp_path}"]
        + ["sdist", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=100,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    tracked = {name for name in listed.stdout.splitlines() if not name.startswith(".")}
    assert tracked - packed == set()
