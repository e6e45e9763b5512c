# SPDX-License-Identifier: Apache-2.0
"""Memory for large tensors that is in a file: the system writes it out where memory is short."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

# Gives a tensor of a shape and dtype, with any values.
Empty = Callable[[Sequence[int], torch.dtype], Tensor]

_LARGE = 2**20
_CHUNK = 2**26
_ALIGNMENT = 64


def memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Ordinary memory."""
    return torch.empty(tuple(shape), dtype=dtype)


class DiskMemory:
    """Gives large tensors room in files without a name in ``folder``, which last as long as the
    tensors. OSError where the disk is full."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        nbytes = count * dtype.itemsize
        if nbytes < _LARGE:
            return memory(shape, dtype)
        if self._chunk is None or self._used + nbytes > len(self._chunk):
            self._chunk, self._used = self._mapped(max(nbytes, _CHUNK)), 0
        begin = self._used
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return torch.frombuffer(self._chunk, dtype=dtype, count=count, offset=begin).view(*shape)

    def _mapped(self, nbytes: int) -> mmap.mmap:
        with tempfile.TemporaryFile(dir=self._folder) as file:
            # A write into mapped memory for which the disk has no room ends the process.
            os.posix_fallocate(file.fileno(), 0, nbytes)
            return mmap.mmap(file.fileno(), nbytes)
