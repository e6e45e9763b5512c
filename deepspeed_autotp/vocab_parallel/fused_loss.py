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
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepspeed_autotp.interop.torch_private import keeps_graph
from deepspeed_autotp.vocab_parallel.cross_entropy import LossTask, token_losses
from deepspeed_autotp.vocab_parallel.cross_entropy_kernels import differentiate_
from deepspeed_autotp.vocab_parallel.head_product import HeadProduct, add_product

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
        gradients = _Gradients(x, w, b, wanted)
        rows_of_w, bias = w.to(dtype), None if b is None else b.to(dtype)
        losses = x.new_empty(len(x), dtype=_summed(dtype))
        scale = torch.ones_like(losses).div_(count)
        scale.masked_fill_(labels == task.loss.ignore_index, 0)
        for rows, space in _chunks(product, len(x)):
            xs = x[rows].to(dtype)
            if bias is None:
                torch.mm(xs, rows_of_w.t(), out=space)
            else:
                torch.addmm(bias, xs, rows_of_w.t(), out=space)
            z = space
            for function, numbers in task.factors:
                z = function(z, *numbers)
            losses[rows], logsumexp = token_losses(z, labels[rows], task.loss)
            if any(wanted):
                columns, cap = labels[rows] - task.loss.start, task.loss.soft_cap
                differentiate_(z, logsumexp, columns, scale[rows], cap=cap)
                gradients.add(rows, _through(z, task.factors, dtype), xs, rows_of_w)
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
    """Of hidden states, weight and bias, where they are ``wanted``."""

    def __init__(
        self, x: Tensor, w: Tensor, b: Tensor | None, wanted: tuple[bool, bool, bool]
    ) -> None:
        self._dx = torch.empty_like(x) if wanted[0] else None
        summed = [
            torch.zeros_like(p, dtype=_summed(p.dtype)) if p is not None and is_wanted else None
            for p, is_wanted in zip((w, b), wanted[1:], strict=True)
        ]
        self._dw, self._db = summed
        self._dtype = w.dtype

    def add(self, rows: slice, dy: Tensor, x: Tensor, w: Tensor) -> None:
        """What a chunk adds, ``rows`` of all tokens, with logits x w'."""
        if self._dx is not None:
            self._dx[rows] = dy.mm(w)
        if self._dw is not None:
            add_product(self._dw, dy, x)
        if self._db is not None:
            self._db += dy.sum(0, dtype=self._db.dtype)

    def finished(self) -> tuple[Tensor | None, ...]:
        """In the data types of what they are of."""
        summed = (None if d is None else d.to(self._dtype) for d in (self._dw, self._db))
        return (self._dx, *summed)


def _summed(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _through(dz: Tensor, factors: tuple[Factor, ...], dtype: torch.dtype) -> Tensor:
    """The gradient before ``factors`` from that behind them, in the data type of the product."""
    for function, numbers in reversed(factors):
        dz = dz.to(dtype) if function is Tensor.float else function(dz, *numbers)
    return dz


def _chunks(product: HeadProduct, tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the tokens, and the same memory for the logits of each chunk."""
    step, width = min(product.tokens, tokens), product.weight.shape[0]
    space = product.x.new_empty(step, width, dtype=product.dtype)
    for first in range(0, tokens, step):
        rows = slice(first, min(first + step, tokens))
        yield rows, space[: rows.stop - first]
