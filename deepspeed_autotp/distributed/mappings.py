# SPDX-License-Identifier: Apache-2.0
"""Autograd functions over one tensor-parallel group, as dual pairs.

whole -> parts                        parts -> whole
copy_to_ranks   y = x                 sum_over_ranks  y = sum_r x_r
                dx = sum_r dy_r                       dx = dy
take_own        y = own part of x     gather_parts    y = all parts in their places
                dx = gather_parts(dy)                 dx = take_own(dy)

A run that several ranks hold is the same on all of them, and each has a part of its gradient: the
parts are added where the gradient becomes whole, and each holder takes its share of a whole one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepspeed_autotp.distributed.process_group import TPGroup


@dataclass(frozen=True, slots=True)
class Parts:
    """Where every rank's part of a dimension lies.

    ``runs[rank]`` is start, length, start, length, ... ; ``widths[rank]`` the sum of lengths;
    ``size`` the whole. Read from a plan entry, never computed.
    """

    size: int
    widths: tuple[int, ...]
    runs: tuple[tuple[int, ...], ...]

    @property
    def uneven(self) -> bool:
        """Whether some rank has more than another."""
        return len(set(self.widths)) > 1


def _pairs(runs: Sequence[int]) -> zip[tuple[int, int]]:
    return zip(runs[::2], runs[1::2], strict=True)


def _own(x: Tensor, parts: Parts, rank: int, dim: int = -1) -> Tensor:
    pieces = [x.narrow(dim, start, length) for start, length in _pairs(parts.runs[rank])]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def _sized(x: Tensor, dim: int, size: int) -> list[int]:
    """The shape of ``x`` with another size of one dimension."""
    shape = list(x.shape)
    shape[dim] = size
    return shape


def _whole(x: Tensor, parts: Parts, group: TPGroup, dim: int = -1) -> Tensor:
    shapes = [_sized(x, dim, width) for width in parts.widths]
    whole = x.new_empty(_sized(x, dim, parts.size))
    for rank, part in enumerate(group.all_gather(x, shapes)):
        taken = 0
        for start, length in _pairs(parts.runs[rank]):
            whole.narrow(dim, start, length).copy_(part.narrow(dim, taken, length))
            taken += length
    return whole


def _is_shared(parts: Parts) -> bool:
    """Whether several ranks hold some run."""
    return sum(parts.widths) > parts.size


def own_share(dy: Tensor, parts: Parts, rank: int, dim: int) -> Tensor:
    """The own part of a whole gradient, divided by the number of ranks that hold it, too."""
    if not _is_shared(parts):
        return _own(dy, parts, rank, dim)
    held = [run for runs in parts.runs for run in _pairs(runs)]
    return torch.cat(
        [
            dy.narrow(dim, start, length) / held.count((start, length))
            for start, length in _pairs(parts.runs[rank])
        ],
        dim=dim,
    )


def _whole_gradient(dy: Tensor, parts: Parts, group: TPGroup) -> Tensor:
    """The whole gradient from those of the parts, added where several ranks hold a run."""
    if not _is_shared(parts):
        return _whole(dy, parts, group)
    whole = dy.new_zeros(*dy.shape[:-1], parts.size)
    taken = 0
    for start, length in _pairs(parts.runs[group.rank]):
        whole.narrow(-1, start, length).copy_(dy.narrow(-1, taken, length))
        taken += length
    return group.all_reduce(whole)


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TPGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        # The sum is in place, and autograd may hold dy for another consumer of the value.
        return ctx.group.all_reduce(dy.clone()), None


class _SumOverRanks(torch.autograd.Function):
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


class _GatherParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Parts, group: TPGroup, dim: int) -> Tensor:
        ctx.parts, ctx.group, ctx.dim = parts, group, dim
        return _whole(x, parts, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return own_share(dy, ctx.parts, ctx.group.rank, ctx.dim), None, None, None


class _TakeOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Parts, group: TPGroup) -> Tensor:
        ctx.parts, ctx.group = parts, group
        return _own(x, parts, group.rank)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _whole_gradient(dy, ctx.parts, ctx.group), None, None


def copy_to_ranks(x: Tensor, group: TPGroup) -> Tensor:
    """``y = x``, for any number of consumers; the gradients of the ranks are summed."""
    y: Tensor = _CopyToRanks.apply(x, group)  # type: ignore[no-untyped-call]
    return y


def sum_over_ranks(x: Tensor, group: TPGroup) -> Tensor:
    """``y = sum over ranks of x``, in place of ``x``; the gradient passes unchanged."""
    y: Tensor = _SumOverRanks.apply(x, group)  # type: ignore[no-untyped-call]
    return y


def gather_parts(x: Tensor, parts: Parts, group: TPGroup, *, dim: int = -1) -> Tensor:
    """``[..., width] -> [..., size]``; the gradient is the own part of the whole gradient.

    ``dim`` is the dimension that is cut, the last one unless given.
    """
    y: Tensor = _GatherParts.apply(x, parts, group, dim)  # type: ignore[no-untyped-call]
    return y


def take_own(x: Tensor, parts: Parts, group: TPGroup) -> Tensor:
    """``[..., size] -> [..., width]``; the gradient is gathered from all ranks."""
    y: Tensor = _TakeOwn.apply(x, parts, group)  # type: ignore[no-untyped-call]
    return y
