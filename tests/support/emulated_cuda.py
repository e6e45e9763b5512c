# SPDX-License-Identifier: Apache-2.0
"""The .cu files compiled for the CPU, against tests/emulated/cuda_runtime, and called.

Imports no torch, so that a process which is to die of a call starts quickly.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cuda"
RUNTIME = ROOT / "tests" / "emulated" / "cuda_runtime"

# In which blocks and threads run: forward, backward, and in two ways at random.
ORDERS = (0, 1, 2, 3)
FEW, MANY = 8, 500  # copies that go into a launch
STREAM = ctypes.c_void_p(5)

_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-fno-sanitize-recover=all"]
_WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Werror", "-Wno-unknown-pragmas"]


class Args(ctypes.Structure):
    """``tp_cross_entropy_args`` of csrc/cuda/cross_entropy.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("logits", "columns", "statistics", "logsumexp", "scale")
        ),
        ("tokens", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("cap", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


class Copy(ctypes.Structure):
    """``tp_copy`` of csrc/pack/copy.h."""

    _fields_ = (
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("source_pitch", "target_pitch", "rows", "row_bytes")),
        ("word", ctypes.c_int32),
        ("first_tile", ctypes.c_int32),
    )


class Lookup(ctypes.Structure):
    """``tp_lookup`` of csrc/pack/embedding_lookup.h."""

    _fields_ = (
        ("copy", Copy),
        ("ids", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("start", "rows", "vocabulary")),
        ("id_bytes", ctypes.c_int32),
    )


class Library:
    """The functions of a library that ``build`` made; each gives a CUDA error, 0 for none."""

    def __init__(self, file: Path) -> None:
        self._functions = ctypes.CDLL(str(file))
        self._functions.emulated_launches.restype = ctypes.c_int64

    def order(self, wanted: int) -> None:
        """Run blocks and threads in this one of ``ORDERS`` from now on."""
        self._functions.emulated_order(wanted)

    @property
    def launches(self) -> int:
        return int(self._functions.emulated_launches())

    @property
    def error_left(self) -> int:
        """The error that the next one who asks CUDA would find."""
        return int(self._functions.emulated_error_left())

    def copy(self, copies: Sequence[Copy], *, in_order: bool = False) -> int:
        start = (
            self._functions.tp_copy_start_in_order if in_order else self._functions.tp_copy_start
        )
        listed = (Copy * len(copies))(*copies)
        return int(start(listed, ctypes.c_int64(len(copies)), STREAM))

    def lookup(self, lookup: Lookup) -> int:
        return int(self._functions.tp_lookup_start(ctypes.byref(lookup), STREAM))

    def statistics(self, args: Args) -> int:
        return int(self._functions.tp_cross_entropy_statistics(ctypes.byref(args), STREAM))

    def gradient(self, args: Args) -> int:
        return int(self._functions.tp_cross_entropy_gradient(ctypes.byref(args), STREAM))

    def read(self, numbers: int, floats: int, count: int, kind: int) -> None:
        """16-bit floats of one ``kind`` as the kernels read them; both are addresses."""
        self._functions.numbers_read(*_arrays(numbers, floats, count, kind))

    def round(self, floats: int, numbers: int, count: int, kind: int) -> None:
        self._functions.numbers_round(*_arrays(floats, numbers, count, kind))


def _arrays(source: int, target: int, count: int, kind: int) -> tuple[object, ...]:
    pointers = (ctypes.c_void_p(source), ctypes.c_void_p(target))
    return *pointers, ctypes.c_int64(count), ctypes.c_int32(kind)


def build(folder: Path, *, sanitize: str = "undefined") -> Path:
    """libautotp_cuda.so in ``folder``, with the sanitizers; "address" has to be loaded ahead."""
    sources = [*KERNELS.glob("*.cu"), RUNTIME / "runtime.cpp", RUNTIME / "float16.cpp"]
    objects = [_compiled(source, folder, sanitize) for source in sources]
    return _linked(objects, folder / "libautotp_cuda.so", sanitize)


def build_edited(folder: Path, built: Path, file: str, text: str, instead: str) -> Path:
    """The library that ``build`` made, with one text of a .cu file replaced."""
    copied = folder / "cuda"
    shutil.copytree(KERNELS, copied)
    source = (copied / file).read_text()
    assert source.count(text) == 1, f"{file} has {source.count(text)} times {text}"
    (copied / file).write_text(source.replace(text, instead))
    others = [path for path in built.parent.glob("*.o") if path.name != f"{file}.o"]
    objects = [*others, _compiled(copied / file, folder, "undefined")]
    return _linked(objects, folder / "edited.so", "undefined")


def _compiled(source: Path, folder: Path, sanitize: str) -> Path:
    target = folder / f"{source.name}.o"
    # An edited copy finds its own headers first.
    headers = [f"-I{folder}" for folder in (RUNTIME, source.parent.parent, KERNELS.parent)]
    options = [*_FLAGS, f"-fsanitize={sanitize}", *_WARNINGS, *headers]
    run("g++", *options, '-DAUTOTP_ARCHS="90"', "-x", "c++", "-c", source, "-o", target)
    return target


def _linked(objects: Sequence[Path], target: Path, sanitize: str) -> Path:
    run("g++", "-shared", f"-fsanitize={sanitize}", *objects, "-o", target)
    return target


def death(call: str, library: Path, **environment: str) -> str:
    """What a process prints that a call of a library ends, with a page of memory at ``start``."""
    script = f"""
import ctypes
from pathlib import Path
from tests.support.emulated_cuda import Args, Copy, Library

memory = ctypes.create_string_buffer(4096 + 16)
start = (ctypes.addressof(memory) + 15) // 16 * 16
library = Library(Path({str(library)!r}))
{call}
"""
    command = [sys.executable, "-c", script]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr


def run(*command: object) -> str:
    """What a command writes; a failure shows its errors."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
