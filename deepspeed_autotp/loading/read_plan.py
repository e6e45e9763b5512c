# SPDX-License-Identifier: Apache-2.0
"""What is read of a checkpoint into the tensors of a rank, in the order of the files.

A slice whose data type and order of elements are those of the file goes right into its tensor.
Another one goes through memory of a bounded size. What a conversion makes of full tensors comes
last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor

from deepspeed_autotp._core import plan_reads
from deepspeed_autotp.interop.torch_private import with_leaves
from deepspeed_autotp.loading.slices import Box, Slice, full_box, halves, placed, slices
from deepspeed_autotp.loading.stored_tensor import FileTensor, LoadedTensor
from deepspeed_autotp.loading.traced_tensor import Cast, Computed, Origin, TracedTensor
from deepspeed_autotp.native.file_reads import OpenFiles

__all__ = ["ReadPlan", "Target", "are_equal"]

# Parts of a file with less between them count as one: a system that reads ahead fetches it, too.
_GAP = 128 << 10
# Bytes of a slice that goes through other memory; small enough for a cache of a CPU.
_STAGED = 2 << 20
# Elements that are compared at once.
_COMPARED = 4 << 20

# A slice, and the contiguous tensor for which its ``out`` stands; the tensor may have no memory
# until the reads run.
Target = tuple[Slice, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Stored:
    """A slice of a tensor in a file."""

    piece: Slice
    tensor: Tensor
    stored: FileTensor
    is_staged: bool


class ReadPlan:
    """The reads of ``targets``, which go to memory on the CPU unless ``to_device``."""

    def __init__(self, targets: Iterable[Target], *, to_device: bool = False) -> None:
        self._stored: list[_Stored] = []
        self._others: list[Target] = []
        for piece, tensor in targets:
            if isinstance(piece.origin, FileTensor):
                self._stored.extend(_stored(piece, tensor, piece.origin, to_device))
            else:
                self._others.append((piece, tensor))
        self._paths = list(dict.fromkeys(each.stored.path for each in self._stored))
        files = {path: index for index, path in enumerate(self._paths)}
        reads, self._spans, self._bytes = plan_reads(
            [_described(each, files) for each in self._stored], gap=_GAP
        )
        self._reads: Mapping[int, list[int]] = _by_slice(reads)
        self._computed = [(piece, _parts(piece)) for piece, _ in self._others]

    def __str__(self) -> str:
        return f"{decimal(self.bytes_to_read)} from {len(self._spans)} parts of files"

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        """Which parts of files have what is read: path, begin and end."""
        return [(self._paths[file], begin, end) for file, begin, end in self._spans]

    @property
    def bytes_to_read(self) -> int:
        """Of stored tensors, those that a conversion needs in full among them."""
        others = sum(part.bytes_to_read for _, parts in self._computed for part in parts)
        loaded = sum(_nbytes(p) for p, _ in self._others if isinstance(p.origin, LoadedTensor))
        return self._bytes + others + loaded

    def run(self, files: OpenFiles, advance: Callable[[int], object]) -> None:
        """Give all tensors their values, and ``advance`` by each number of bytes that is read."""
        for index, reads in self._reads.items():
            _read(self._stored[index], reads, files)
            advance(_nbytes(self._stored[index].piece))
        for piece, tensor in self._others:
            out = placed(piece, tensor)
            if isinstance(piece.origin, LoadedTensor):
                out.copy_(piece.origin.tensor[_index(piece.box)])
                advance(_nbytes(piece))
            else:
                out.copy_(_computed(piece, files, advance))


def are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two traced tensors have the same values, read a part at a time."""
    assert isinstance(one, TracedTensor) and isinstance(other, TracedTensor)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    empty = torch.empty(tuple(one.shape), dtype=one.dtype, device="meta")
    parts = halves(Slice(one.origin, full_box(tuple(one.shape)), empty), _COMPARED)
    with OpenFiles() as files:
        return all(
            torch.equal(*(_part(each.origin, part.box, one.dtype, files) for each in (one, other)))
            for part in parts
        )


def _part(origin: Origin, box: Box, dtype: torch.dtype, files: OpenFiles) -> Tensor:
    made = torch.empty([length for _, length in box], dtype=dtype)
    ReadPlan(_targets(origin, box, made)).run(files, lambda _: None)
    return made


def _stored(piece: Slice, tensor: Tensor, stored: FileTensor, to_device: bool) -> Iterator[_Stored]:
    strides = [
        s for s, (_, length) in zip(piece.out.stride(), piece.box, strict=True) if length > 1
    ]
    in_order = strides == sorted(strides, reverse=True) and strides[-1:] in ([], [1])
    if in_order and piece.out.dtype == stored.dtype and not to_device:
        yield _Stored(piece, tensor, stored, False)
        return
    for part in halves(piece, _STAGED // stored.dtype.itemsize):
        yield _Stored(part, tensor, stored, True)


def _described(each: _Stored, files: Mapping[str, int]) -> tuple[Any, ...]:
    """As ``plan_reads`` takes it."""
    stored, box, out = each.stored, each.piece.box, each.piece.out
    if each.is_staged:
        out = torch.empty([length for _, length in box], device="meta")
    return (
        files[stored.path],
        stored.begin,
        stored.dtype.itemsize,
        stored.shape,
        [start for start, _ in box],
        [length for _, length in box],
        out.storage_offset(),
        out.stride(),
    )


def _by_slice(reads: Sequence[tuple[int, ...]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for index, *read in reads:
        found[index].extend(read)
    return found


def _read(each: _Stored, reads: Sequence[int], files: OpenFiles) -> None:
    if not each.is_staged:
        files.read(each.tensor.detach(), each.stored.path, reads)
        return
    staged = torch.empty([length for _, length in each.piece.box], dtype=each.stored.dtype)
    files.read(staged, each.stored.path, reads)
    placed(each.piece, each.tensor).copy_(staged)


def _computed(piece: Slice, files: OpenFiles, advance: Callable[[int], object]) -> Tensor:
    """The values of a slice that is no slice of one stored tensor."""
    origin = piece.origin
    if isinstance(origin, Cast):
        made = torch.empty([length for _, length in piece.box], dtype=origin.dtype)
        ReadPlan(_targets(origin.of, piece.box, made)).run(files, advance)
        return made
    assert isinstance(origin, Computed)
    args, kwargs = with_leaves(
        TracedTensor, lambda given: _full(given, files, advance), (origin.args, origin.kwargs)
    )
    result = origin.function(*args, **kwargs)
    full: Tensor = result if origin.item is None else result[origin.item]
    return full[_index(piece.box)]


def _full(traced: TracedTensor, files: OpenFiles, advance: Callable[[int], object]) -> Tensor:
    full = torch.empty(tuple(traced.shape), dtype=traced.dtype)
    ReadPlan(_targets(traced.origin, full_box(tuple(traced.shape)), full)).run(files, advance)
    return full


def _parts(piece: Slice) -> list[ReadPlan]:
    """What is read for a slice that has to be computed, to count it."""
    origin = piece.origin
    if isinstance(origin, Cast):
        out = torch.empty([n for _, n in piece.box], dtype=origin.dtype, device="meta")
        return [ReadPlan(_targets(origin.of, piece.box, out))]
    if not isinstance(origin, Computed):
        return []
    found: list[ReadPlan] = []

    def collect(given: TracedTensor) -> None:
        box = full_box(tuple(given.shape))
        out = torch.empty(tuple(given.shape), dtype=given.dtype, device="meta")
        found.append(ReadPlan(_targets(given.origin, box, out)))

    with_leaves(TracedTensor, collect, (origin.args, origin.kwargs))
    return found


def _targets(origin: Origin, box: Box, out: Tensor) -> Iterator[Target]:
    stands_for = torch.empty(out.shape, dtype=out.dtype, device="meta")
    for piece in slices(origin, box, stands_for):
        yield piece, out


def _nbytes(piece: Slice) -> int:
    """Of a slice of a stored tensor, there."""
    assert isinstance(piece.origin, (FileTensor, LoadedTensor))
    return piece.out.numel() * piece.origin.dtype.itemsize


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in box)
