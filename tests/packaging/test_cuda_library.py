# SPDX-License-Identifier: Apache-2.0
"""The CUDA library: what is in it, and what happens where it is not, or has nothing to run on."""

import ctypes
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepspeed_autotp.native import operators
from tests.support.cuda_architectures import architectures

ROOT = Path(__file__).resolve().parents[2]
ABI = int(re.findall(r"TP_CUDA_ABI = (\d+)", (ROOT / "csrc" / "cuda" / "api.h").read_text())[0])
RELEASE = {75, 80, 90, 100, 110, 120}
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
needs_library = pytest.mark.skipif(
    bool(operators.find_library().reason), reason="the package was built without nvcc"
)


def kernels_in(library: Path) -> list[tuple[set[int], set[int]]]:
    """Without the CUDA runtime's own empty fat binary, which holds code for one architecture
    and no intermediate code."""
    return [(machine, ptx) for machine, ptx in architectures(library) if ptx]


@needs_library
def test_the_library_holds_code_for_the_architectures_it_names() -> None:
    library = operators.find_library()
    found = kernels_in(Path(library.path))
    assert len(found) >= len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    for machine, ptx in found:
        assert machine == set(library.archs) and ptx == {library.archs[-1]}
    assert library.toolkit >= (12, 1)


@needs_nvcc
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_release_compiles_without_warnings_for_all_architectures() -> None:
    folder = ROOT / "build" / "release"
    options = [f"--build-lib={folder}", f"--build-temp={folder}"]
    environment = {k: v for k, v in os.environ.items() if k != "AUTOTP_CUDA_ARCHS"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_cuda", *options],
        cwd=ROOT,
        env={**environment, "AUTOTP_WERROR": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    library = folder / "deepspeed_autotp" / "libautotp_cuda.so"
    assert all(entry == (RELEASE, {120}) for entry in kernels_in(library))
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True
    )
    assert [line.split()[-1] for line in exported.stdout.splitlines()] == ["tp_cuda_api_get"]
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True).stdout
    assert "cudart" not in needed, "the runtime is inside"


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_driver_is_an_error_code_and_not_a_crash() -> None:
    for _ in range(2):
        found = operators.devices()
        assert found.count == 0
        assert found.error in (35, 100), "no driver, or no device"
        assert found.message
    assert not operators.on_gpu(torch.zeros(1))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The opening of the library alone, without torch."""
    made = tmp_path_factory.mktemp("reader") / "reader.so"
    source = str(ROOT / "csrc" / "torch" / "cuda_library.c")
    subprocess.run(
        [
            "gcc",
            "-std=c11",
            "-shared",
            "-fPIC",
            f"-iquote{ROOT / 'csrc'}",
            source,
            "-o",
            str(made),
            "-ldl",
        ],
        check=True,
    )
    return made


READ = """
import ctypes, sys
class Library(ctypes.Structure):
    _fields_ = [("api", ctypes.c_void_p), ("reason", ctypes.c_char_p), ("path", ctypes.c_char_p)]
open_ = ctypes.CDLL(sys.argv[1]).tp_cuda_library_open
open_.restype = ctypes.POINTER(Library)
assert open_()[0].api is None
print(open_()[0].reason.decode())
"""


def reason(reader: Path, library: str | None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "AUTOTP_CUDA_LIBRARY"}
    if library is not None:
        environment["AUTOTP_CUDA_LIBRARY"] = library
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", READ, str(reader)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_missing_or_foreign_library_is_one_message(reader: Path, tmp_path: Path) -> None:
    again = "install the package again where nvcc is in PATH, with AUTOTP_CUDA=1"
    beside = reader.parent / "libautotp_cuda.so"
    missing = "cannot open shared object file: No such file or directory"
    assert reason(reader, None) == (
        f"the CUDA library cannot be opened ({beside}: {missing}); {again}"
    )
    text = tmp_path / "text.so"
    text.write_text("no library")
    assert reason(reader, str(text)).startswith("the CUDA library cannot be opened (")
    assert reason(reader, "") == (
        "AUTOTP_CUDA_LIBRARY is empty, which turns libautotp_cuda.so off; unset it to use the "
        "library"
    )
    # Any library without our table, and one with a table of another time.
    assert reason(reader, str(reader)) == (
        f"{reader} belongs to another build of this package (interface 0, expected {ABI}); {again}"
    )
    source = tmp_path / "other.c"
    source.write_text(
        "static int table[64] = {7};\nvoid *tp_cuda_api_get(void) { return table; }\n"
    )
    other = tmp_path / "other.so"
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(other)], check=True)
    assert f"(interface 7, expected {ABI})" in reason(reader, str(other))


WITHOUT = """
import torch
from deepspeed_autotp.native import operators
from deepspeed_autotp.native import packing
assert operators.find_library().reason and operators.find_library().archs == ()
full = torch.arange(12.0).view(3, 4)
print(packing.pack(full, view=(3, 4, 1), runs=(1, 2), shape=(3, 2)).tolist())
try:
    operators.devices()
except RuntimeError as error:
    print(error)
"""


def test_the_package_works_without_the_library() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT],
        cwd=ROOT,
        env={**os.environ, "AUTOTP_CUDA_LIBRARY": "/nowhere.so"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shard, error = done.stdout.splitlines()
    assert shard == "[[1.0, 2.0], [5.0, 6.0], [9.0, 10.0]]"
    assert "/nowhere.so" in error and "AUTOTP_CUDA=1" in error


def test_an_obstacle_is_told_once_and_torch_takes_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class OnGpu:
        device = torch.device("cuda", 3)

        def get_device(self) -> int:
            return 3

    operators._is_available.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        operators, "unavailable_reason", lambda index: f"no code for device {index}"
    )
    with caplog.at_level(logging.WARNING, logger="deepspeed_autotp"):
        assert not operators.on_gpu(OnGpu())  # type: ignore[arg-type]
        assert not operators.on_gpu(OnGpu())  # type: ignore[arg-type]
    operators._is_available.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "cuda:3: the CUDA kernels are not available, using torch's own operations, which are "
        "slower: no code for device 3"
    ]


@pytest.mark.usefixtures("compile_cache")
def test_the_choice_of_kernels_does_not_break_a_compiled_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def obstacle(index: int) -> str:
        asked.append(index)
        return ""

    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if operators._runs(5) else x

    operators._is_available.cache_clear()
    monkeypatch.setattr(operators, "unavailable_reason", obstacle)
    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == compiled(torch.zeros(2)).tolist() == [1, 1]
    assert asked == [5]
    operators._is_available.cache_clear()


@needs_library
def test_the_table_has_the_layout_that_the_header_says() -> None:
    """The library is opened as a stranger would: by name, and its first numbers read."""
    entry = ctypes.CDLL(operators.find_library().path).tp_cuda_api_get
    entry.restype = ctypes.POINTER(ctypes.c_int32)
    assert entry()[0] == ABI and entry()[1] >= 12010
