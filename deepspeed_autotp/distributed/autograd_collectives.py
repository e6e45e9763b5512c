# SPDX-License-Identifier: Apache-2.0
"""Autograd functions over one TP group, as dual pairs, named as Megatron-LM names them.

replicated -> per rank                     per rank -> replicated
copy_to_tp_region     y = x                reduce_from_tp_region  y = sum_r x_r
                      dx = sum_r dy_r                             dx = dy
scatter_to_tp_region  y = shard of x       gather_from_tp_region  y = the full tensor
                      dx = gather(dy)                             dx = scatter(dy)

A run that several ranks hold has the same values on all of them, and each rank computes a part of
its gradient: the gradient of a scatter sums those parts, and that of a gather gives each of the
holders its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.first_derivatives import once_differentiable


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """How a dimension is sharded over the ranks.

    ``runs[rank]`` is start, length, start, length, ... ; ``widths[rank]`` the sum of lengths;
    ``size`` that of the full dimension. Read from a plan entry, never computed.
    """

    size: int
    widths: tuple[int, ...]
    runs: tuple[tuple[int, ...], ...]

    @property
    def is_uneven(self) -> bool:
        """Whether ranks have different widths."""
        return len(set(self.widths)) > 1

    @property
    def has_shared_runs(self) -> bool:
        """Whether several ranks hold some run."""
        return sum(self.widths) > self.size


def _pairs(runs: Sequence[int]) -> zip[tuple[int, int]]:
    return zip(runs[::2], runs[1::2], strict=True)


def _shard(x: Tensor, layout: ShardLayout, rank: int, dim: int = -1) -> Tensor:
    pieces = [x.narrow(dim, start, length) for start, length in _pairs(layout.runs[rank])]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def _resized(x: Tensor, dim: int, size: int) -> list[int]:
    """The shape of ``x`` with another size of one dimension."""
    shape = list(x.shape)
    shape[dim] = size
    return shape


def _all_gather(x: Tensor, layout: ShardLayout, group: TPGroup, dim: int = -1) -> Tensor:
    shapes = [_resized(x, dim, width) for width in layout.widths]
    full = x.new_empty(_resized(x, dim, layout.size))
    for rank, shard in enumerate(group.all_gather(x, shapes)):
        offset = 0
        for start, length in _pairs(layout.runs[rank]):
            full.narrow(dim, start, length).copy_(shard.narrow(dim, offset, length))
            offset += length
    return full


def gradient_shard(dy: Tensor, layout: ShardLayout, rank: int, dim: int) -> Tensor:
    """This rank's shard of a full gradient; a run that n ranks hold is divided by n."""
    if not layout.has_shared_runs:
        return _shard(dy, layout, rank, dim)
    held = [run for runs in layout.runs for run in _pairs(runs)]
    return torch.cat(
        [
            dy.narrow(dim, start, length) / held.count((start, length))
            for start, length in _pairs(layout.runs[rank])
        ],
        dim=dim,
    )


def _full_gradient(dy: Tensor, layout: ShardLayout, group: TPGroup, dim: int) -> Tensor:
    """The full gradient of the ranks' shards, summed where several ranks hold a run."""
    if not layout.has_shared_runs:
        return _all_gather(dy, layout, group, dim)
    full = dy.new_zeros(_resized(dy, dim, layout.size))
    offset = 0
    for start, length in _pairs(layout.runs[group.rank]):
        full.narrow(dim, start, length).copy_(dy.narrow(dim, offset, length))
        offset += length
    return group.all_reduce(full)


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TPGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        # The sum is in place, and autograd may hold dy for another consumer of the value.
        return ctx.group.all_reduce(dy.clone()), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TPGroup) -> Tensor:
        total = group.all_reduce(x)
        if total is x and not torch.compiler.is_compiling():
            ctx.mark_dirty(x)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _GatherFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: ShardLayout, group: TPGroup, dim: int) -> Tensor:
        ctx.layout, ctx.group, ctx.dim = layout, group, dim
        return _all_gather(x, layout, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient_shard(dy, ctx.layout, ctx.group.rank, ctx.dim), None, None, None


class _ScatterToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: ShardLayout, group: TPGroup, dim: int) -> Tensor:
        ctx.layout, ctx.group, ctx.dim = layout, group, dim
        return _shard(x, layout, group.rank, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _full_gradient(dy, ctx.layout, ctx.group, ctx.dim), None, None, None


def copy_to_tp_region(x: Tensor, group: TPGroup) -> Tensor:
    """``y = x``, for any number of consumers; the gradients of the ranks are summed."""
    y: Tensor = _CopyToRegion.apply(x, group)  # type: ignore[no-untyped-call]
    return y


def reduce_from_tp_region(x: Tensor, group: TPGroup) -> Tensor:
    """``y = sum over ranks of x``, in place of ``x``; the gradient passes unchanged."""
    y: Tensor = _ReduceFromRegion.apply(x, group)  # type: ignore[no-untyped-call]
    return y


def gather_from_tp_region(
    x: Tensor, layout: ShardLayout, group: TPGroup, *, dim: int = -1
) -> Tensor:
    """``[..., width] -> [..., size]``; the gradient is this rank's shard of the full gradient.

    ``dim`` is the dimension that is sharded, the last one unless given.
    """
    y: Tensor = _GatherFromRegion.apply(x, layout, group, dim)  # type: ignore[no-untyped-call]
    return y


def scatter_to_tp_region(
    x: Tensor, layout: ShardLayout, group: TPGroup, *, dim: int = -1
) -> Tensor:
    """``[..., size] -> [..., width]``; the gradient is gathered from all ranks.

    ``dim`` is the dimension to shard, the last one unless given.
    """
    y: Tensor = _ScatterToRegion.apply(x, layout, group, dim)  # type: ignore[no-untyped-call]
    return y
