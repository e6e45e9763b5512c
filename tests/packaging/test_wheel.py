# SPDX-License-Identifier: Apache-2.0
"""What goes into a wheel needs nothing but torch, the C and the C++ library."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepspeed_autotp import _core
from deepspeed_autotp.native import operators

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(str(_core.__file__)).parent
ALWAYS = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "libgcc_s.so.1"}
ALWAYS |= {"libstdc++.so.6", "librt.so.1"}
ALWAYS |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
# Of torch, its stable ABI alone: C functions, no name that a C++ compiler has made.
STABLE = re.compile(r"(aoti_|torch_)")

needs_tools = pytest.mark.skipif(
    shutil.which("readelf") is None or shutil.which("nm") is None, reason="binutils are missing"
)


def needed(library: Path) -> set[str]:
    shown = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True)
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", shown.stdout))


def undefined(library: Path) -> list[str]:
    shown = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", str(library)], capture_output=True, text=True
    )
    return [line.split(maxsplit=1)[1] for line in shown.stdout.splitlines()]


@needs_tools
def test_the_core_carries_pcre2() -> None:
    found = subprocess.run(
        ["gcc", "-print-file-name=libpcre2-8.a"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("there is no static PCRE2 here")
    assert needed(FOLDER / "_core.abi3.so") <= ALWAYS


@needs_tools
def test_the_operators_use_the_stable_interface_of_torch_alone() -> None:
    library = FOLDER / "_ops.abi3.so"
    assert needed(library) - ALWAYS == {"libtorch_cpu.so"}
    names = undefined(library)
    assert [name for name in names if "c10::" in name or "at::" in name] == []
    assert any(STABLE.match(name) for name in names)
    assert not any(name.startswith("Py") for name in names), "it serves every Python"


@needs_tools
def test_the_cuda_library_carries_its_runtime() -> None:
    library = operators.find_library()
    if library.reason:
        pytest.skip("the package was built without nvcc")
    assert needed(Path(library.path)) <= ALWAYS


def test_the_wheel_has_the_templates_of_the_page(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", f"--build-lib={tmp_path}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=100,
    )
    place = Path("deepspeed_autotp", "cli", "page", "templates")
    there = sorted(path.name for path in (ROOT / place).iterdir())
    assert "page.html.j2" in there
    assert sorted(path.name for path in (tmp_path / place).iterdir()) == there
