# SPDX-License-Identifier: Apache-2.0
"""The operators for a GPU, run on a CPU: a stand-in for torch's GPU calls is loaded ahead of
torch, and the CUDA library is its .cu files compiled for the CPU, under ASan and UBSan."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import emulated_cuda
from tests.support.fake_nccl import compiled

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "emulated"

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="torch has GPU calls itself")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What is loaded ahead of torch, and the CUDA library."""
    folder = tmp_path_factory.mktemp("stand-ins")
    ahead = folder / "libtorch_cuda.so"
    options = ["-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libtorch_cuda.so"]
    emulated_cuda.run("gcc", *options, "-shared", SOURCES / "fake_torch.c", "-o", ahead)
    return ahead, emulated_cuda.build(folder, sanitize="address,undefined")


def preloaded(*ahead: Path) -> dict[str, str]:
    """Variables that load ASan, the library of C++ whose throwing it looks for, and others."""
    names = ("libasan.so", "libstdc++.so")
    sanitizer = [emulated_cuda.run("gcc", f"-print-file-name={name}") for name in names]
    # What is not given back is Python's own.
    return {
        "LD_PRELOAD": ":".join(map(str, [*sanitizer, *ahead])),
        "ASAN_OPTIONS": "detect_leaks=0",
    }


def run(stand_ins: tuple[Path, Path], what: str, **environment: str) -> list[str]:
    ahead, library = stand_ins
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from tests.emulated import cuda_operators_ranks as ranks; ranks.{what}()",
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            **preloaded(ahead),
            "AUTOTP_CUDA_LIBRARY": str(library),
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_operators_give_what_the_cpu_gives_and_refuse_what_does_not_fit(
    stand_ins: tuple[Path, Path],
) -> None:
    expected = (
        "ValueError: run 0 (start 3, length 2) is outside the sharded dimension of size 4",
        "ValueError: full is not contiguous; call full.contiguous() first",
        "ValueError: slices has entries for fewer tensors than fulls has",
        "ValueError: run 1 (start 0, length 1) starts before the end of the run before it",
        "ValueError: shard has another dtype than full; call shard.to(full.dtype) first",
        "ValueError: expected logits [tokens, width] and columns [tokens]",
        "ValueError: columns: expected int64; call columns.long() first",
        "ValueError: logits: expected float32, float16 or bfloat16",
        "ValueError: cap: expected 0, for no soft cap, or more",
        "ValueError: logsumexp and scale: expected contiguous float32 [tokens]",
        "ValueError: ids: expected int64 or int32; call ids.long() first",
        "ValueError: weight or ids are not contiguous; call .contiguous() first",
        "ValueError: start: expected 0 to size - rows; the rows of this rank are inside",
    )
    said = run(stand_ins, "results_and_refusals")
    assert len(said) == len(expected)
    for got, wanted in zip(said, expected, strict=True):
        assert got.startswith(wanted)


def test_a_byte_beyond_a_tensor_is_noticed(stand_ins: tuple[Path, Path]) -> None:
    copy = "Copy(source={}, target={}, rows=1, row_bytes=64, word=1)"
    inside, beyond = "ctypes.addressof(memory)", "ctypes.addressof(memory) + 4096 + 16 - 63"
    for ends in ((inside, beyond), (beyond, inside)):
        call = f"library.copy([{copy.format(*ends)}])"
        said = emulated_cuda.death(call, stand_ins[1], **preloaded())
        assert "heap-buffer-overflow" in said


def test_a_launch_that_fails_is_an_error_with_cudas_message(stand_ins: tuple[Path, Path]) -> None:
    *said, refused = run(stand_ins, "errors", EMULATED_ERROR="209")
    assert refused.startswith("the device cannot be selected: ")
    assert said == [
        "RuntimeError: a copy of runs could not be started on cuda:0: no kernel image "
        "(CUDA error 209)",
        "RuntimeError: the statistics of logits could not be started on cuda:0: no kernel image "
        "(CUDA error 209)",
        "RuntimeError: a lookup of rows could not be started on cuda:0: no kernel image "
        "(CUDA error 209)",
        "its CUDA library has code for the architectures 90: no kernel image (CUDA error 209)",
    ]


def test_shards_go_through_nccl_on_the_stream_of_the_device(
    stand_ins: tuple[Path, Path], tmp_path: Path
) -> None:
    said = run(
        stand_ins,
        "through_nccl",
        AUTOTP_NCCL=str(compiled(tmp_path / "libstandin.so")),
        FAKE_NCCL_FOLDER=str(tmp_path),
        FAKE_NCCL_STREAM="5",
    )
    assert said == [
        "whole",
        "ValueError: tensors to send or receive: expected on the device of the communicator",
        "RuntimeError:",
        "RuntimeError: rank 1 of 2: gather: sending to rank 0: its stream has failed "
        "(CUDA error 209)",
    ]
