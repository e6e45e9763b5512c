# SPDX-License-Identifier: Apache-2.0
"""Autograd functions that shard the tokens of an activation over one TP group, as dual pairs.

full x, full gradient -> shard                shard, full gradient -> full
scatter_to_sequence_region         y = rows   gather_from_sequence_region  y = all rows
                                   dx = gather(dy)                         dx = rows of dy

full x, to be summed -> shard                 shard -> full, gradient to be summed
reduce_scatter_to_sequence_region             started in the backward of layers.grad_overlap:
    y = rows of sum x_r, dx = gather(dy)          dx = rows of sum dy_r

A row is a token: batch and sequence are flattened, so that little is padded whatever the batch is,
and a rank's rows are contiguous. N is the number of rows, n that of a rank, R the ranks, F the
features, of which there may be more dimensions, as with several streams.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.first_derivatives import once_differentiable
from deepspeed_autotp.interop.torch_private import reshaped, version_counter


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """How the tokens of one batch are sharded over the ranks.

    All ranks have as many rows, so that the last ones may be padding. One graph of torch.compile is
    then for all ranks, and for any number of tokens.

    shape  of the full activation without its features: batch and sequence, or tokens
    rows   of a rank
    ranks  how many there are
    """

    shape: tuple[int, ...]
    rows: int
    ranks: int

    @staticmethod
    def of(x: Tensor, ranks: int) -> SequenceLayout:
        """That of a full activation over ``ranks`` ranks."""
        shape = tuple(x.shape[:2] if x.dim() > 2 else x.shape[:-1])
        return SequenceLayout(shape, (math.prod(shape) + ranks - 1) // ranks, ranks)

    @property
    def widths(self) -> tuple[int, ...]:
        """The rows of every rank."""
        return (self.rows,) * self.ranks

    @property
    def padding(self) -> int:
        """How many rows are padding."""
        return self.rows * self.ranks - math.prod(self.shape)

    def is_shard(self, x: Tensor) -> bool:
        """Whether ``x`` has the shape of a shard."""
        lead = x.shape[: len(self.shape)]
        return math.prod(lead) == lead[-1] == self.rows

    def full_shape(self, shard: Tensor) -> tuple[int, ...]:
        """``[1, n, F]`` gives that of the full activation, ``[n, F]`` ``[N, F]``."""
        dims = self._token_dims(shard)
        lead = self.shape if dims > 1 else (math.prod(self.shape),)
        return (*lead, *shard.shape[dims:])

    def as_rows(self, x: Tensor) -> Tensor:
        """``[..., F] -> [N, F]``, of a full activation or a shard."""
        dims = self._token_dims(x)
        return x.reshape(math.prod(x.shape[:dims]), *x.shape[dims:])

    def shard_shape(self, rows: Tensor, like: Tensor) -> tuple[int, ...]:
        """``[n, F]`` gives ``[1, n, F]``, with as many dimensions as ``like`` has."""
        return (*(1,) * (self._token_dims(like) - 1), *rows.shape)

    def _token_dims(self, x: Tensor) -> int:
        return len(self.shape) if x.dim() > len(self.shape) else 1


@dataclass(frozen=True, slots=True)
class GatheredSequence:
    """``full`` was gathered from ``shard``, this rank's tokens, and had ``version`` then."""

    shard: Tensor
    full: Tensor
    version: int
    layout: SequenceLayout

    @staticmethod
    def of(shard: Tensor, full: Tensor, layout: SequenceLayout) -> GatheredSequence:
        """What was just gathered. torch.compile traces no versions, but a tensor that torch refuses
        to write to, so that no gradient passes by what was written."""
        if torch.compiler.is_compiling():
            return GatheredSequence(shard, _read_only(full), 0, layout)
        return GatheredSequence(shard, full, version_counter(full), layout)

    def is_full(self, x: Tensor) -> bool:
        """Whether ``x`` is that very tensor, and not written to since."""
        if self.full is not x:
            return False
        return torch.compiler.is_compiling() or self.version == version_counter(x)


def _own(rows: Tensor, layout: SequenceLayout, rank: int) -> Tensor:
    return rows.narrow(0, rank * layout.rows, layout.rows)


def _padded(x: Tensor, layout: SequenceLayout) -> Tensor:
    """``[..., F] -> [n * R, F]``, and the last row again for padding: what is computed of it is
    computed of that row, too, and as finite."""
    rows = layout.as_rows(x)
    if layout.padding == 0:
        return rows
    return torch.cat([rows, rows[-1:].expand(layout.padding, *rows.shape[1:])])


def padded_gradient(dy: Tensor, layout: SequenceLayout) -> Tensor:
    """``[..., F] -> [n * R, F]``, and zeros for padding, on which nothing depends."""
    rows = layout.as_rows(dy)
    if layout.padding == 0:
        return rows
    return F.pad(rows, (*(0, 0) * (rows.dim() - 1), 0, layout.padding))


def own_rows_of_gradient(dy: Tensor, layout: SequenceLayout, rank: int) -> Tensor:
    """``[..., F] -> [n, F]``, of a full gradient."""
    return _own(padded_gradient(dy, layout), layout, rank)


def local_rows(x: Tensor, layout: SequenceLayout, rank: int) -> Tensor:
    """``[..., F] -> [1, n, F]`` with as many dimensions."""
    local = _own(_padded(x, layout), layout, rank)
    return local.reshape(layout.shard_shape(local, x))


def _all_rows(x: Tensor, layout: SequenceLayout, group: TPGroup) -> Tensor:
    rows = group.all_gather_rows(layout.as_rows(x), layout.widths)
    if layout.padding:
        rows = rows.narrow(0, 0, math.prod(layout.shape))
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
        return own_rows_of_gradient(dy, ctx.layout, ctx.group.rank).reshape(ctx.shape), None, None


class _ReduceScatterToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: SequenceLayout, group: TPGroup) -> Tensor:
        ctx.layout, ctx.group, ctx.shape = layout, group, x.shape
        rows = group.reduce_scatter_rows(_padded(x, layout), layout.widths)
        return reshaped(rows, layout.shard_shape(rows, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _all_rows(dy, ctx.layout, ctx.group).reshape(ctx.shape), None, None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, layout: SequenceLayout, group: TPGroup
    ) -> Tensor:
        ctx.layout, ctx.group, ctx.shape = layout, group, x.shape
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        dx = ctx.group.reduce_scatter_rows(padded_gradient(dy, ctx.layout), ctx.layout.widths)
        return dx.reshape(ctx.shape), None, None, None


class _ReadOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def _read_only(x: Tensor) -> Tensor:
    """``x``, of which torch refuses what writes to it in place."""
    y: Tensor = _ReadOnly.apply(x)  # type: ignore[no-untyped-call]
    return y


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


def with_summed_gradient(shard: Tensor, layout: SequenceLayout, group: TPGroup) -> Tensor:
    """``[1, n, F] -> [..., F]``; the gradient is this rank's rows of the sum over ranks."""
    with torch.no_grad():
        full = _all_rows(shard, layout, group)
    rows = rows_with_summed_gradient(GatheredSequence.of(shard, full, layout), group)
    return rows.view(layout.full_shape(shard))


def rows_with_summed_gradient(gathered: GatheredSequence, group: TPGroup) -> Tensor:
    """The full activation as ``[N, F]``; the gradient is this rank's rows of the sum over ranks."""
    rows = gathered.layout.as_rows(gathered.full.detach())
    y: Tensor = _SumGradients.apply(gathered.shard, rows, gathered.layout, group)  # type: ignore[no-untyped-call]
    return y
