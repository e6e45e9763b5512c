# SPDX-License-Identifier: Apache-2.0
"""Which slices of which stored tensors make a slice of a parameter.

``box`` is a slice: a start and a length for each dimension. Where a slice goes is a tensor of its
shape, which may be on the meta device: only its place in its memory counts then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepspeed_autotp._core import Entry
from deepspeed_autotp.loading.stored_tensor import FileTensor, LoadedTensor, Stored
from deepspeed_autotp.loading.traced_tensor import (
    Cast,
    Concatenated,
    Narrowed,
    Origin,
    Stacked,
    Swapped,
)

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """``box`` of ``origin``, which is made in full unless it is stored, into ``out``."""

    origin: Origin
    box: Box
    out: Tensor


def full_box(shape: tuple[int, ...]) -> Box:
    return tuple((0, size) for size in shape)


def own_slices(
    origin: Origin, entry: Entry | None, rank: int, shape: Sequence[int], dtype: torch.dtype
) -> Iterator[Slice]:
    """What makes the share of ``rank`` of a tensor, of ``shape``; into a tensor on the meta device
    that stands for it. Without an entry that is the full tensor."""
    out = torch.empty(shape, dtype=dtype, device="meta")
    if entry is None:
        yield from slices(origin, full_box(tuple(shape)), out)
    else:
        yield from shard_slices(origin, entry, rank, out)


def placed(piece: Slice, tensor: Tensor) -> Tensor:
    """Where ``piece`` goes in the contiguous ``tensor``, for which its ``out`` stands."""
    out = piece.out
    return tensor.detach().as_strided(out.shape, out.stride(), out.storage_offset())


def shard_slices(origin: Origin, entry: Entry, rank: int, out: Tensor) -> Iterator[Slice]:
    """What makes the shard of ``entry`` on ``rank``; ``out`` has its shape, and is contiguous."""
    if not entry.is_sharded:
        yield from slices(origin, full_box(entry.shape), out)
        return
    outer, size, inner = entry.view
    dim, shape = entry.dim, entry.shape
    if (outer, size, inner) != _around(shape, dim):
        stored, dtype = _stored(origin)
        if stored is None:
            raise NotImplementedError(
                f"{entry.name} is viewed as {entry.view} and made of several tensors; load the "
                "model on every rank and shard it then"
            )
        origin, dim, shape = stored.viewed(entry.view), 1, entry.view
        origin = origin if dtype is None else Cast(origin, dtype)
        out = out.view(outer, entry.width(rank), inner)
    runs, offset = entry.runs(rank), 0
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        box = list(full_box(shape))
        box[dim] = (start, length)
        yield from slices(origin, tuple(box), out.narrow(dim, offset, length))
        offset += length


def _around(shape: tuple[int, ...], dim: int) -> tuple[int, int, int]:
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


def _stored(origin: Origin) -> tuple[Stored | None, torch.dtype | None]:
    if isinstance(origin, Cast) and isinstance(origin.of, (FileTensor, LoadedTensor)):
        return origin.of, origin.dtype
    return (origin, None) if isinstance(origin, (FileTensor, LoadedTensor)) else (None, None)


def slices(origin: Origin, box: Box, out: Tensor) -> Iterator[Slice]:
    """The slices of stored and of computed tensors that make ``box`` of ``origin``."""
    if any(length == 0 for _, length in box):
        return
    if isinstance(origin, Cast) and origin.dtype == out.dtype:
        yield from slices(origin.of, box, out)
    elif isinstance(origin, Stacked):
        start, length = box[origin.dim]
        inner = box[: origin.dim] + box[origin.dim + 1 :]
        for index in range(length):
            part = origin.parts[start + index]
            yield from slices(part, inner, out.select(origin.dim, index))
    elif isinstance(origin, Concatenated):
        yield from _of_concatenated(origin, box, out)
    elif isinstance(origin, Narrowed):
        yield from slices(origin.of, _moved(box, origin.dim, origin.start), out)
    elif isinstance(origin, Swapped):
        order = list(range(len(box)))
        order[origin.first], order[origin.second] = origin.second, origin.first
        swapped = tuple(box[dim] for dim in order)
        yield from slices(origin.of, swapped, out.transpose(origin.first, origin.second))
    else:
        yield Slice(origin, box, out)


def _of_concatenated(origin: Concatenated, box: Box, out: Tensor) -> Iterator[Slice]:
    dim = origin.dim
    first, length = box[dim]
    begin = 0
    for part, size in zip(origin.parts, origin.sizes, strict=True):
        start, end = max(first, begin), min(first + length, begin + size)
        if start < end:
            inner = box[:dim] + ((start - begin, end - start),) + box[dim + 1 :]
            yield from slices(part, inner, out.narrow(dim, start - first, end - start))
        begin += size


def _moved(box: Box, dim: int, by: int) -> Box:
    start, length = box[dim]
    return box[:dim] + ((start + by, length),) + box[dim + 1 :]


def halves(piece: Slice, most: int) -> Iterator[Slice]:
    """``piece`` in parts of at most ``most`` elements, in the order of its own, or of rows of its
    last dimension."""
    dim = next((dim for dim, (_, n) in enumerate(piece.box[:-1]) if n > 1), None)
    if dim is None or piece.out.numel() <= most:
        yield piece
        return
    start, length = piece.box[dim]
    first = length // 2
    for offset, size in ((0, first), (first, length - first)):
        box = piece.box[:dim] + ((start + offset, size),) + piece.box[dim + 1 :]
        yield from halves(replace(piece, box=box, out=piece.out.narrow(dim, offset, size)), most)
