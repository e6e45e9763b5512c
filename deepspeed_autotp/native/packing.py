# SPDX-License-Identifier: Apache-2.0
"""Pack runs of a full tensor into a shard, and unpack a shard into its runs.

A tensor is seen as ``view = (outer, size, inner)`` around the sharded dimension. ``runs`` is a flat
list ``start, length, start, length, ...`` along ``size``, in elements; a shard is the concatenation
of its runs. ``view``, ``runs`` and the shape of the shard come from an entry of the plan.

Contiguous tensors on the CPU, and on a GPU where the CUDA library runs, are copied by the operators
of ``torch.ops.deepspeed_autotp``; every other device and layout by torch, run by run, without a
contiguous copy of the full tensor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from deepspeed_autotp.native import operators

__all__ = [
    "ShardSlice",
    "compact_",
    "narrow",
    "pack",
    "pack_many",
    "pack_part_",
    "unpack_",
    "unpack_part_",
]

View = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class ShardSlice:
    """What a shard takes of a full tensor."""

    view: View
    runs: Sequence[int]
    shape: Sequence[int]


@operators.fake("pack")
def _pack_fake(
    full: Tensor, outer: int, size: int, inner: int, runs: Sequence[int], shape: Sequence[int]
) -> Tensor:
    return full.new_empty(shape)


@operators.fake("unpack_")
def _unpack_fake(
    full: Tensor, shard: Tensor, outer: int, size: int, inner: int, runs: Sequence[int]
) -> None:
    return None


@operators.fake("pack_many")
def _pack_many_fake(fulls: Sequence[Tensor], slices: Sequence[int]) -> list[Tensor]:
    shards = []
    for full in fulls:
        values, dims = slices[3:5]
        shards.append(full.new_empty(slices[5 + values : 5 + values + dims]))
        slices = slices[5 + values + dims :]
    return shards


@operators.fake("pack_part_")
def _pack_part_fake(
    part: Tensor,
    full: Tensor,
    outer: int,
    size: int,
    inner: int,
    runs: Sequence[int],
    shape: Sequence[int],
    begin: int,
) -> None:
    return None


@operators.fake("unpack_part_")
def _unpack_part_fake(
    part: Tensor,
    shard: Tensor,
    outer: int,
    size: int,
    inner: int,
    runs: Sequence[int],
    begin: int,
) -> None:
    return None


@operators.fake("compact_")
def _compact_fake(
    full: Tensor, outer: int, size: int, inner: int, runs: Sequence[int], shape: Sequence[int]
) -> None:
    return None


@operators.fake("check")
def _check_fake(
    outer: int,
    size: int,
    inner: int,
    runs: Sequence[int],
    full_items: int,
    shard_items: int,
    disjoint: bool,
) -> None:
    return None


def pack(full: Tensor, *, view: View, runs: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The shard of ``full`` as a new tensor of ``shape``, on the same device.

    The result never shares memory with ``full`` and has no gradient function. No other memory is
    allocated.
    ValueError when a run is outside the sharded dimension or when the sizes do not match.
    """
    with torch.no_grad():
        if _has_operator_layout(full):
            return operators.loaded().pack(full, *view, runs, shape)  # type: ignore[no-any-return]
        operators.loaded().check(*view, runs, full.numel(), math.prod(shape), False)
        shard = full.new_empty(shape)
        for source, target in _pairs(full, shard, view=view, runs=runs):
            target.copy_(source)
        return shard


def pack_many(fulls: Sequence[Tensor], slices: Sequence[ShardSlice]) -> list[Tensor]:
    """``pack`` for many tensors; on a GPU in a few launches.

    All shards are allocated at once. ValueError as for ``pack``, before anything is copied.
    """
    devices = {full.device for full in fulls}
    with torch.no_grad():
        if len(devices) == 1 and _has_operators(fulls[0]) and all(map(_is_in_memory_order, fulls)):
            table: list[int] = []
            for s in slices:
                table += (*s.view, len(s.runs), len(s.shape), *s.runs, *s.shape)
            return operators.loaded().pack_many(fulls, table)  # type: ignore[no-any-return]
    return [
        pack(full, view=s.view, runs=s.runs, shape=s.shape)
        for full, s in zip(fulls, slices, strict=True)
    ]


def pack_part_(part: Tensor, full: Tensor, of: ShardSlice, *, begin: int) -> None:
    """Fill ``part``, bytes on the CPU, with those of the shard of ``full`` from ``begin`` on."""
    with torch.no_grad():
        operators.loaded().pack_part_(part, full, *of.view, of.runs, of.shape, begin)


def compact_(full: Tensor, *, view: View, runs: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The shard of a contiguous ``full``, packed in place, as a view of the front of its memory.

    Allocates nothing; the memory behind the shard is unused. ValueError as for ``pack``, and where
    runs do not ascend.
    """
    if not full.is_contiguous():
        raise ValueError("packing in place needs a contiguous tensor")
    with torch.no_grad():
        if _has_operator_layout(full):
            operators.loaded().compact_(full, *view, runs, shape)
            torch.autograd.graph.increment_version(full)
        else:
            _check_ascending(runs)
            packed = pack(full.cpu(), view=view, runs=runs, shape=shape)
            full.view(-1)[: packed.numel()].copy_(packed.view(-1))
        return full.detach().view(-1)[: math.prod(shape)].view(shape)


def narrow(full: Tensor, *, view: View, runs: Sequence[int], shape: Sequence[int]) -> Tensor | None:
    """The shard of ``full`` as a view of its memory, or None where it has to be a copy.

    It is a view when there is one run and the strides of ``full`` allow ``shape``.
    ValueError as for ``pack``.
    """
    operators.loaded().check(*view, runs, full.numel(), math.prod(shape), False)
    if len(runs) != 2:
        return None
    seen, dim = _split_view(full, view)
    try:
        return seen.narrow(dim, runs[0], runs[1]).view(shape)
    except RuntimeError:  # the strides do not allow a view
        return None


def unpack_(full: Tensor, shard: Tensor, *, view: View, runs: Sequence[int]) -> None:
    """Write ``shard`` into its runs of ``full``, in place; other elements keep their values.

    ``shard`` may have any shape with the right number of elements.
    ValueError as for ``pack``, when runs overlap, and when dtypes or devices differ.
    """
    if shard.dtype != full.dtype or shard.device != full.device:
        raise ValueError(
            f"the shard is {shard.dtype} on {shard.device}, expected {full.dtype} on {full.device} "
            "as the full tensor"
        )
    with torch.no_grad():
        if _has_operator_layout(full) and _has_operator_layout(shard):
            operators.loaded().unpack_(full, shard, *view, runs)
            # Autograd does not see the writes of the operator.
            torch.autograd.graph.increment_version(full)
            return
        operators.loaded().check(*view, runs, full.numel(), shard.numel(), True)
        for target, source in _pairs(full, shard, view=view, runs=runs):
            target.copy_(source)


def unpack_part_(
    part: Tensor, shard: Tensor, *, view: View, runs: Sequence[int], begin: int
) -> None:
    """As ``unpack_`` into ``part``, bytes on the CPU of the full tensor from byte ``begin`` on.

    ``shard`` is contiguous on the CPU; what of it is elsewhere in the full tensor is left out.
    """
    with torch.no_grad():
        operators.loaded().unpack_part_(part, shard, *view, runs, begin)


def _check_ascending(runs: Sequence[int]) -> None:
    """The operator's check, where it does not run."""
    pairs = list(zip(runs[::2], runs[1::2], strict=False))
    for index, ((before, length), (start, own)) in enumerate(pairwise(pairs), 1):
        if start < before + length:
            raise ValueError(
                f"run {index} (start {start}, length {own}) starts before the end of the run "
                "before it; packing in place needs runs in ascending order"
            )


def _has_operator_layout(tensor: Tensor) -> bool:
    """Whether an operator runs on the device and layout of ``tensor``."""
    return _has_operators(tensor) and _is_in_memory_order(tensor)


def _has_operators(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or operators.on_gpu(tensor)


def _is_in_memory_order(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not (tensor.dtype.is_complex and tensor.is_conj())
    )


def _pairs(
    full: Tensor, shard: Tensor, *, view: View, runs: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """For each run, views of the same shape of ``full`` and of ``shard``; sizes are checked."""
    if shard.numel() == 0:
        return []
    seen, dim = _split_view(full, view)
    rows = shard.reshape(*seen.shape[:dim], -1, *seen.shape[dim + 1 :])
    lengths = runs[1::2]
    offsets = accumulate(lengths, initial=0)
    return [
        (seen.narrow(dim, start, length), rows.narrow(dim, offset, length))
        for start, length, offset in zip(runs[::2], lengths, offsets, strict=False)
    ]


def _split_view(full: Tensor, view: View) -> tuple[Tensor, int]:
    """A view of ``full`` in which the sharded dimension is separate, and its index.

    Splits at most one dimension of ``full``, which any strides allow; ``full.view(view)`` would
    refuse transposed tensors.
    """
    if full.is_contiguous() or full.numel() == 0:
        return full.view(view), 1
    outer, size, _ = view
    before, dim = 1, 0
    while before * full.shape[dim] < outer * size:
        before *= full.shape[dim]
        dim += 1
    sizes = (outer // before, size, before * full.shape[dim] // (outer * size))
    if math.prod(sizes) != full.shape[dim]:
        raise ValueError(
            f"the view {view} merges dimensions of a tensor of shape {tuple(full.shape)}, which "
            "has to be contiguous for that"
        )
    return torch.unflatten(full, dim, sizes), dim + 1
