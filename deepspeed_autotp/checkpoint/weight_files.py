# SPDX-License-Identifier: Apache-2.0
"""The safetensors files of a checkpoint: which bytes of which tensor are where, and their memory.

All of a file is known before it is written, so that a tensor, or the shard of a rank, is put into
its place whenever it is there, by any rank that has it.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepspeed_autotp.checkpoint.safetensors_file import FileLayout, file_layout
from deepspeed_autotp.interop.pretrained import SavedModel, SavedTensor


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes ``[begin, begin + nbytes)`` of a full tensor are in ``file`` from byte ``at`` on."""

    file: str
    at: int
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Computed:
    """Tensors of the files that are computed from full tensors of the model, all at once."""

    sources: tuple[str, ...]
    places: Mapping[str, Place]


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """``places`` are by names of tensors in the model."""

    layouts: Mapping[str, FileLayout]
    places: Mapping[str, tuple[Place, ...]]
    computed: tuple[Computed, ...]

    @property
    def nbytes(self) -> int:
        """Of all ``places``."""
        return sum(place.nbytes for places in self.places.values() for place in places)

    def make(self, folder: Path) -> None:
        """Make the files with their headers and room for their tensors. OSError without it."""
        for name, layout in self.layouts.items():
            handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                # A write into mapped memory for which the disk has no room ends the process.
                os.posix_fallocate(handle, 0, layout.size)
                os.pwrite(handle, layout.header, 0)
            finally:
                os.close(handle)

    @contextmanager
    def opened(self, folder: Path) -> Iterator[OpenFiles]:
        """The files that :meth:`make` made in ``folder``, to write tensors into."""
        files = OpenFiles({name: _mapped(folder / name) for name in self.layouts})
        try:
            yield files
        finally:
            files.close()


class OpenFiles:
    """Files in mapped memory."""

    def __init__(self, memory: dict[str, Tensor]) -> None:
        self._memory = memory

    def part(self, place: Place) -> Tensor:
        """The bytes of a file at ``place``, to write to."""
        return self._memory[place.file][place.at : place.at + place.nbytes]

    def close(self) -> None:
        """Let go of the memory; what was written stays."""
        self._memory = {}


def weight_files(saved: SavedModel) -> WeightFiles:
    """The files of ``saved``. ValueError for a dtype that safetensors do not have."""
    tensors = {tensor.name: tensor for tensor in saved.tensors}
    layouts = {
        file: file_layout([tensors[name] for name in names], metadata={"format": "pt"})
        for file, names in saved.files.items()
    }
    whole = {
        name: Place(file, layout.begins[name], 0, _nbytes(tensors[name]))
        for file, layout in layouts.items()
        for name in layout.begins
    }
    places: dict[str, list[Place]] = {}
    for tensor in saved.tensors:
        if tensor.begin >= 0:
            at = whole[tensor.name]
            begin = tensor.begin * tensor.dtype.itemsize
            places.setdefault(tensor.sources[0], []).append(Place(at.file, at.at, begin, at.nbytes))
    computed = [tensor for tensor in saved.tensors if tensor.begin < 0]
    return WeightFiles(
        layouts,
        {name: tuple(found) for name, found in places.items()},
        tuple(
            Computed(sources, {name: whole[name] for name in names})
            for sources, names in _groups(computed)
        ),
    )


def _groups(
    computed: Iterable[SavedTensor],
) -> Iterator[tuple[tuple[str, ...], Sequence[str]]]:
    """Tensors that have sources in common, with all of their sources."""
    groups: list[tuple[set[str], list[str]]] = []
    for tensor in computed:
        sources, names = set(tensor.sources), [tensor.name]
        for group in [g for g in groups if g[0] & sources]:
            groups.remove(group)
            sources |= group[0]
            names = group[1] + names
        groups.append((sources, names))
    for sources, names in groups:
        yield tuple(sorted(sources)), names


def _nbytes(tensor: SavedTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _mapped(file: Path) -> Tensor:
    """The bytes of ``file``; the memory is let go of with the tensor."""
    with open(file, "r+b") as opened:
        memory = mmap.mmap(opened.fileno(), 0)
    return torch.frombuffer(memory, dtype=torch.uint8)
