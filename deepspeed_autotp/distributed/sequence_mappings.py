# SPDX-License-Identifier: Apache-2.0
"""Autograd functions that cut the tokens of an activation over one group, as dual pairs.

all tokens, whole gradient -> own       own tokens -> all, whole gradient
take_tokens    y = own rows of x        gather_tokens  y = all rows in their places
               dx = gather_tokens(dy)                  dx = take_tokens(dy)

all tokens, a part of the sum -> own    own tokens -> all, a part of the gradient
sum_tokens     y = own rows of sum x_r  begun in the backward of layers.grad_overlap:
               dx = gather_tokens(dy)                  dx = own rows of sum dy_r

A row is a token: all dimensions but the last are one, so that ranks differ by one row at most
whatever the batch is, and a rank's rows lie side by side in memory. N is the number of rows, n a
rank's, F the features.
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


@dataclass(frozen=True, slots=True)
class Tokens:
    """How the tokens of one batch lie on the ranks.

    shape   of the whole activation without its features
    widths  rows of every rank
    """

    shape: tuple[int, ...]
    widths: tuple[int, ...]

    @staticmethod
    def of(x: Tensor, ranks: int) -> Tokens:
        """Those of a whole activation over ``ranks`` ranks."""
        shape = tuple(x.shape[:-1])
        return Tokens(shape, split(math.prod(shape), 1, ranks))

    def is_own(self, x: Tensor, rank: int) -> bool:
        """Whether ``x`` has the shape of the part that ``rank`` has."""
        return math.prod(x.shape[:-1]) == x.shape[-2] == self.widths[rank]

    def whole_shape(self, own: Tensor) -> tuple[int, ...]:
        """``[1, n, F]`` gives that of the whole activation, ``[n, F]`` ``[N, F]``."""
        lead = self.shape if own.dim() > len(self.shape) else (sum(self.widths),)
        return (*lead, own.shape[-1])


@dataclass(frozen=True, slots=True)
class Gathered:
    """``whole`` is what was gathered of ``own``, this rank's tokens, at its ``version``."""

    own: Tensor
    whole: Tensor
    version: int
    tokens: Tokens

    def is_whole(self, x: Tensor) -> bool:
        """One tensor, and not written to in between."""
        return self.whole is x and self.version == x._version


def own_rows(x: Tensor, tokens: Tokens, rank: int) -> Tensor:
    """``[..., F] -> [1, n, F]`` with as many dimensions."""
    rows = x.reshape(-1, x.shape[-1])
    own = rows.narrow(0, sum(tokens.widths[:rank]), tokens.widths[rank])
    return own.reshape(*(1,) * (x.dim() - 2), *own.shape)


def _as(rows: Tensor, like: Tensor) -> Tensor:
    return _shaped(rows, (*(1,) * (like.dim() - 2), *rows.shape))


def _shaped(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows that nobody else has in another shape: no view, which models could not write into."""
    shaped: Tensor = torch.ops.aten._unsafe_view(rows, shape)
    return shaped


def _all_rows(x: Tensor, tokens: Tokens, group: TPGroup) -> Tensor:
    rows = group.all_gather_rows(x.reshape(-1, x.shape[-1]), tokens.widths)
    return _shaped(rows, tokens.whole_shape(x))


class _TakeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tokens, group: TPGroup) -> Tensor:
        ctx.tokens, ctx.group = tokens, group
        # A view would keep the whole activation alive as long as a part of it is.
        return own_rows(x, tokens, group.rank).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _all_rows(dy, ctx.tokens, ctx.group), None, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tokens, group: TPGroup) -> Tensor:
        ctx.tokens, ctx.group, ctx.dims = tokens, group, x.shape
        return _all_rows(x, tokens, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return own_rows(dy, ctx.tokens, ctx.group.rank).reshape(ctx.dims), None, None


class _SumTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tokens, group: TPGroup) -> Tensor:
        ctx.tokens, ctx.group, ctx.dims = tokens, group, x.shape
        started, rows = group.start_reduce_scatter(x.reshape(-1, x.shape[-1]), tokens.widths)
        started.wait()
        return _as(rows, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _all_rows(dy, ctx.tokens, ctx.group).reshape(ctx.dims), None, None


def take_tokens(x: Tensor, tokens: Tokens, group: TPGroup) -> Tensor:
    """``[..., F] -> [1, n, F]``; the gradient is gathered from all ranks."""
    y: Tensor = _TakeTokens.apply(x, tokens, group)  # type: ignore[no-untyped-call]
    return y


def gather_tokens(x: Tensor, tokens: Tokens, group: TPGroup) -> Tensor:
    """``[1, n, F] -> [..., F]``; the gradient is the own rows of the whole gradient."""
    y: Tensor = _GatherTokens.apply(x, tokens, group)  # type: ignore[no-untyped-call]
    return y


def sum_tokens(x: Tensor, tokens: Tokens, group: TPGroup) -> Tensor:
    """``[..., F] -> [1, n, F]``, own rows of the sum over ranks; the gradient is gathered."""
    y: Tensor = _SumTokens.apply(x, tokens, group)  # type: ignore[no-untyped-call]
    return y
