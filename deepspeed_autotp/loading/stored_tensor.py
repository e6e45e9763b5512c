# SPDX-License-Identifier: Apache-2.0
"""A tensor of a checkpoint, in a safetensors file or already in (mapped) memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class FileTensor:
    """``begin`` is the offset of its first byte in ``path``; the elements follow in order."""

    name: str
    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    def __str__(self) -> str:
        """What is the same on every rank, wherever the file is."""
        return f"{Path(self.path).name} at {self.begin}: {list(self.shape)} {self.dtype}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def viewed(self, shape: tuple[int, ...]) -> FileTensor:
        """The same elements in another shape."""
        return replace(self, shape=shape)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedTensor:
    """``tensor`` is contiguous or not, and stays as it is."""

    name: str
    tensor: Tensor

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def viewed(self, shape: tuple[int, ...]) -> LoadedTensor:
        """As of a FileTensor."""
        return LoadedTensor(self.name, self.tensor.reshape(shape))


Stored = FileTensor | LoadedTensor
