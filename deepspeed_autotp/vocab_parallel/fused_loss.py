# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy from hidden states and this rank's rows of the head, a chunk of tokens at a time.

T tokens, C of a chunk, H hidden, V the vocabulary, R ranks. What a chunk adds to the gradients is
formed while its logits are there, so they never exist for all tokens, and no product is formed
twice:

z   [C, V/R]  = f(x w' + b), f numbers that are multiplied or divided by, and a soft cap
dz            = (softmax - [column is label]) / count
dx  [C, H]    = df dz w        a summand, which something before the head sums over the ranks
dw  [V/R, H] += (df dz)' x

forward   one all-gather of [3, C] for each chunk
backward  no communication: the gradients are multiplied by that of the loss

Where a rank has its own tokens only, T/R of the hidden states, a chunk has as many of each rank:

forward   an all-gather of x [C, H] and a reduce-scatter of dx [C, H] for each chunk, too
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed_autotp.interop.first_derivatives import once_differentiable
from deepspeed_autotp.interop.torch_private import keeps_graph
from deepspeed_autotp.vocab_parallel.cross_entropy import LossTask, token_losses
from deepspeed_autotp.vocab_parallel.cross_entropy_kernels import differentiate_
from deepspeed_autotp.vocab_parallel.head_product import (
    HeadProduct,
    ShardedTokens,
    add_product,
)

# A function of logits and the numbers that it is given; of ``FACTORS`` alone.
Factor = tuple[Callable[..., Tensor], tuple[float, ...]]
FACTORS = (Tensor.float, Tensor.mul, Tensor.div)


@dataclass(frozen=True, slots=True)
class FusedTask:
    """``factors``: what the logits are multiplied with before the soft cap of ``loss``.
    ``over``: called in the backward pass unless the graph is retained."""

    loss: LossTask
    factors: tuple[Factor, ...]
    over: Callable[[], None]


def fused_cross_entropy(
    product: HeadProduct, labels: Tensor, count: Tensor | float, task: FusedTask
) -> Tensor:
    """The sum of the losses of all tokens over ``count``; the same bits on every rank.

    labels  [T] int64, replicated

    In float32, or float64 for float64 logits. Errors are those of ``vocabulary_cross_entropy``.
    """
    factors: tuple[Tensor | None, ...] = (product.x, product.weight, product.bias)
    if not torch.is_grad_enabled():
        factors = tuple(None if x is None else x.detach() for x in factors)
    loss: Tensor = _FusedLoss.apply(*factors, labels, count, product, task)  # type: ignore[no-untyped-call]
    return loss


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        labels: Tensor,
        count: Tensor | float,
        product: HeadProduct,
        task: FusedTask,
    ) -> Tensor:
        ctx.shape, ctx.over = x.shape, task.over
        x, dtype = x.reshape(-1, x.shape[-1]), product.dtype
        wanted = ctx.needs_input_grad[:3]
        chunks = _Chunks(x, product.tokens, product.tokens_of)
        gradients = _Gradients(x, w, b, wanted)
        rows_of_w, bias = w.to(dtype), None if b is None else b.to(dtype)
        labels = chunks.in_order(labels, padding=task.loss.ignore_index)
        losses = x.new_empty(len(labels), dtype=_summed(dtype))
        scale = torch.ones_like(losses).div_(count)
        scale.masked_fill_(labels == task.loss.ignore_index, 0)
        space = x.new_empty(chunks.size, len(w), dtype=dtype)
        for own, rows in chunks:
            xs, z = chunks.input(own, dtype), space[: rows.stop - rows.start]
            if bias is None:
                torch.mm(xs, rows_of_w.t(), out=z)
            else:
                torch.addmm(bias, xs, rows_of_w.t(), out=z)
            for function, numbers in task.factors:
                z = function(z, *numbers)
            losses[rows], logsumexp = token_losses(z, labels[rows], task.loss)
            if any(wanted):
                columns, cap = labels[rows] - task.loss.start, task.loss.soft_cap
                differentiate_(z, logsumexp, columns, scale[rows], cap=cap)
                dy = _through(z, task.factors, dtype)
                gradients.add(dy, xs)
                if gradients.dx is not None:
                    gradients.dx[own] = chunks.own_gradient(dy.mm(rows_of_w))
        ctx.save_for_backward(*gradients.finished())
        return losses.sum().div_(count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        retained = keeps_graph()  # and may run again
        if not retained:
            ctx.over()
        dx, dw, db = (
            None if d is None else d * dloss if retained else d.mul_(dloss)
            for d in ctx.saved_tensors
        )
        return None if dx is None else dx.view(ctx.shape), dw, db, None, None, None, None


class _Gradients:
    """Of hidden states, weight and bias, where ``wanted``; others write to ``dx``."""

    def __init__(
        self, x: Tensor, w: Tensor, b: Tensor | None, wanted: tuple[bool, bool, bool]
    ) -> None:
        self.dx = torch.empty_like(x) if wanted[0] else None
        summed = [
            torch.zeros_like(p, dtype=_summed(p.dtype)) if p is not None and is_wanted else None
            for p, is_wanted in zip((w, b), wanted[1:], strict=True)
        ]
        self._dw, self._db = summed
        self._dtype = w.dtype

    def add(self, dy: Tensor, x: Tensor) -> None:
        """What a chunk adds to those of weight and bias."""
        if self._dw is not None:
            add_product(self._dw, dy, x)
        if self._db is not None:
            self._db += dy.sum(0, dtype=self._db.dtype)

    def finished(self) -> tuple[Tensor | None, ...]:
        """In the data types of what they are of."""
        summed = (None if d is None else d.to(self._dtype) for d in (self._dw, self._db))
        return (self.dx, *summed)


def _summed(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _through(dz: Tensor, factors: tuple[Factor, ...], dtype: torch.dtype) -> Tensor:
    """The gradient before ``factors`` from that behind them, in the data type of the product."""
    for function, numbers in reversed(factors):
        dz = dz.to(dtype) if function is Tensor.float else function(dz, *numbers)
    return dz


class _Chunks:
    """Of tokens whose hidden states are ``x``, or, with ``sharded``, of which ``x`` has this
    rank's. Iteration gives the rows of ``x``, and those of all tokens :meth:`in_order`."""

    def __init__(self, x: Tensor, tokens: int, sharded: ShardedTokens | None) -> None:
        self._x, self._sharded = x, sharded
        self._ranks = 1 if sharded is None else sharded.layout.ranks
        self._step = max(1, min(tokens // self._ranks, len(x)))

    @property
    def size(self) -> int:
        """Tokens of a chunk."""
        return self._step * self._ranks

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for first in range(0, len(self._x), self._step):
            last = min(first + self._step, len(self._x))
            yield slice(first, last), slice(first * self._ranks, last * self._ranks)

    def in_order(self, labels: Tensor, *, padding: int) -> Tensor:
        """The labels of all tokens, chunk by chunk, and those of tokens that are padding."""
        if self._sharded is None:
            return labels
        every = F.pad(labels, (0, self._sharded.layout.padding), value=padding)
        chunks = every.view(self._ranks, -1).split(self._step, dim=1)
        return torch.cat([chunk.reshape(-1) for chunk in chunks])

    def input(self, own: slice, dtype: torch.dtype) -> Tensor:
        """The hidden states of a chunk."""
        x = self._x[own].to(dtype)
        if self._sharded is None:
            return x
        return self._sharded.group.all_gather_rows(x, [len(x)] * self._ranks)

    def own_gradient(self, dx: Tensor) -> Tensor:
        """Of ``x``, from this rank's summand of that of a chunk."""
        dx = dx.to(self._x.dtype)
        if self._sharded is None:
            return dx
        widths = [len(dx) // self._ranks] * self._ranks
        return self._sharded.group.reduce_scatter_rows(dx, widths)
