# SPDX-License-Identifier: Apache-2.0
"""Autograd functions that shard the tokens of an activation over one TP group, as dual pairs.

full x, full gradient -> shard                shard, full gradient -> full
scatter_to_sequence_region         y = rows   gather_from_sequence_region  y = all rows
                                   dx = gather(dy)                         dx = rows of dy

full x, to be summed -> shard                 shard -> full, gradient to be summed
reduce_scatter_to_sequence_region             started in the backward of layers.grad_overlap:
    y = rows of sum x_r, dx = gather(dy)          dx = rows of sum dy_r

A row is a token: all dimensions but the last are flattened, so that the ranks' row counts differ by
one at most whatever the batch is, and a rank's rows are contiguous. N is the number of rows, n that
of a rank, F the features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepspeed_autotp._core import split
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.torch_private import reshaped, version_counter


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """How the tokens of one batch are sharded over the ranks.

    shape   of the full activation without its features
    widths  rows of every rank
    """

    shape: tuple[int, ...]
    widths: tuple[int, ...]

    @staticmethod
    def of(x: Tensor, ranks: int) -> SequenceLayout:
        """That of a full activation over ``ranks`` ranks."""
        shape = tuple(x.shape[:-1])
        return SequenceLayout(shape, split(math.prod(shape), 1, ranks))

    def is_shard(self, x: Tensor, rank: int) -> bool:
        """Whether ``x`` has the shape of the shard of ``rank``."""
        return math.prod(x.shape[:-1]) == x.shape[-2] == self.widths[rank]

    def full_shape(self, shard: Tensor) -> tuple[int, ...]:
        """``[1, n, F]`` gives that of the full activation, ``[n, F]`` ``[N, F]``."""
        lead = self.shape if shard.dim() > len(self.shape) else (sum(self.widths),)
        return (*lead, shard.shape[-1])


@dataclass(frozen=True, slots=True)
class GatheredSequence:
    """``full`` was gathered from ``shard``, this rank's tokens, and had ``version`` then."""

    shard: Tensor
    full: Tensor
    version: int
    layout: SequenceLayout

    def is_full(self, x: Tensor) -> bool:
        """Whether ``x`` is that very tensor, and not written to since."""
        return self.full is x and self.version == version_counter(x)


def local_rows(x: Tensor, layout: SequenceLayout, rank: int) -> Tensor:
    """``[..., F] -> [1, n, F]`` with as many dimensions."""
    rows = x.reshape(-1, x.shape[-1])
    local = rows.narrow(0, sum(layout.widths[:rank]), layout.widths[rank])
    return local.reshape(*(1,) * (x.dim() - 2), *local.shape)


def _with_dims_of(rows: Tensor, like: Tensor) -> Tensor:
    return reshaped(rows, (*(1,) * (like.dim() - 2), *rows.shape))


def _all_rows(x: Tensor, layout: SequenceLayout, group: TPGroup) -> Tensor:
    rows = group.all_gather_rows(x.reshape(-1, x.shape[-1]), layout.widths)
    return reshaped(rows, layout.full_shape(x))


class _ScatterToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: SequenceLayout, group: TPGroup) -> Tensor:
        ctx.layout, ctx.group = layout, group
        # A view would keep the full activation alive as long as the shard is.
        return local_rows(x, layout, group.rank).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _all_rows(dy, ctx.layout, ctx.group), None, None


class _GatherFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: SequenceLayout, group: TPGroup) -> Tensor:
        ctx.layout, ctx.group, ctx.shape = layout, group, x.shape
        return _all_rows(x, layout, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return local_rows(dy, ctx.layout, ctx.group.rank).reshape(ctx.shape), None, None


class _ReduceScatterToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: SequenceLayout, group: TPGroup) -> Tensor:
        ctx.layout, ctx.group, ctx.shape = layout, group, x.shape
        work, rows = group.start_reduce_scatter(x.reshape(-1, x.shape[-1]), layout.widths)
        work.wait()
        return _with_dims_of(rows, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _all_rows(dy, ctx.layout, ctx.group).reshape(ctx.shape), None, None


def scatter_to_sequence_region(x: Tensor, layout: SequenceLayout, group: TPGroup) -> Tensor:
    """``[..., F] -> [1, n, F]``; the gradient is gathered from all ranks."""
    y: Tensor = _ScatterToRegion.apply(x, layout, group)  # type: ignore[no-untyped-call]
    return y


def gather_from_sequence_region(x: Tensor, layout: SequenceLayout, group: TPGroup) -> Tensor:
    """``[1, n, F] -> [..., F]``; the gradient is this rank's rows of the full gradient."""
    y: Tensor = _GatherFromRegion.apply(x, layout, group)  # type: ignore[no-untyped-call]
    return y


def reduce_scatter_to_sequence_region(x: Tensor, layout: SequenceLayout, group: TPGroup) -> Tensor:
    """``[..., F] -> [1, n, F]``, this rank's rows of the sum over ranks; the gradient is
    gathered."""
    y: Tensor = _ReduceScatterToRegion.apply(x, layout, group)  # type: ignore[no-untyped-call]
    return y
