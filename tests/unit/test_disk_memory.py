# SPDX-License-Identifier: Apache-2.0
"""Large tensors whose memory is in files that have no name."""

import errno
import os
from pathlib import Path

import pytest
import torch

from deepspeed_autotp.checkpoint.disk_memory import DiskMemory

MIB = 2**20


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def test_tensors_keep_their_values_and_take_no_memory_of_the_process(tmp_path: Path) -> None:
    disk = DiskMemory(tmp_path)
    before = anonymous_bytes()
    shapes = [(3, MIB), (1,), (MIB + 1,), (20 * MIB,), (7, MIB // 2 + 1), ()]
    dtypes = [torch.float32, torch.bfloat16, torch.uint8]
    made = [disk.empty(shape, dtype) for shape in shapes for dtype in dtypes]
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    for number, tensor in enumerate(made):
        assert (tuple(tensor.shape), tensor.dtype) == (
            shapes[number // len(dtypes)],
            dtypes[number % len(dtypes)],
        )
        assert (tensor == number).all()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert anonymous_bytes() - before < 60 * MIB  # of the comparison, of 250
    del disk, made, tensor
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fallocate(handle: int, begin: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    disk = DiskMemory(tmp_path)
    assert disk.empty((2,), torch.float32).shape == (2,)
    with pytest.raises(OSError, match="No space left on device"):
        disk.empty((MIB,), torch.float32)
