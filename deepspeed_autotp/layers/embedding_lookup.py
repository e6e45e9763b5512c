# SPDX-License-Identifier: Apache-2.0
"""The lookup in an embedding whose vocabulary is sharded.

T tokens, V the vocabulary, H the hidden size; this rank holds ``w [W, H]``, the rows of the ids
from s on.

    y[t]  = w[ids[t] - s]  where s <= ids[t] < s + W, else 0
    dw[i] = sum of dy[t] over the tokens t with ids[t] = s + i; 0 for the padding id

One operator computes y, in C on the CPU and with a kernel on a GPU: it reads this rank's rows only
and writes each row of y once. torch's gradient of an embedding computes dw, and skips the tokens
of other ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed_autotp.interop.first_derivatives import once_differentiable
from deepspeed_autotp.native import operators

__all__ = ["lookup"]


def lookup(
    weight: Tensor, ids: Tensor, *, start: int, size: int, padding: int | None = None
) -> Tensor:
    """``[..., H]`` for ids ``[...]`` of int64 or int32: the rows that this rank has, else 0.

    weight   [W, H], the rows of the ids from ``start`` on; W may be 0
    size     V
    padding  an id whose row has no gradient

    IndexError for an id outside the vocabulary on the CPU; elsewhere, where a check would wait for
    the device, its row is NaN, on every rank.
    """
    padding_id = -1 if padding is None else padding
    if weight.device.type == "cpu" or operators.on_gpu(weight):
        ids = ids.contiguous()
        rows: Tensor = operators.loaded().lookup(weight.contiguous(), ids, start, size, padding_id)
        return rows
    found: Tensor = _TorchLookup.apply(weight, ids, start, size, padding_id)  # type: ignore[no-untyped-call]
    return found


def _local(ids: Tensor, rows: int, start: int, padding: int = -1) -> Tensor:
    """Indices of this rank's rows, and ``rows`` where another rank has the row."""
    local = ids - start
    skipped = (local < 0) | (local >= rows)
    if padding >= 0:
        skipped |= ids == padding
    return local.masked_fill_(skipped, rows)


@operators.fake("lookup")
def _lookup_fake(weight: Tensor, ids: Tensor, start: int, size: int, padding: int) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, int, int, int], output: Tensor) -> None:
    weight, ids, ctx.start, _, ctx.padding = inputs
    ctx.rows = weight.shape[0]  # under ZeRO 3 the weight is partitioned in the backward
    ctx.save_for_backward(ids)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
    (ids,) = ctx.saved_tensors
    rows = ctx.rows
    # Skipped tokens have a row of their own behind the others. An index outside of the rows would
    # do on the CPU, but on a GPU torch allocates for no more different indices than there are
    # rows: max_segments in ATen/native/cuda/EmbeddingBackwardKernel.cu.
    local = _local(ids, rows, ctx.start, ctx.padding)
    dw = torch.ops.aten.embedding_dense_backward(dy, local, rows + 1, rows, False)
    return dw[:rows], None, None, None, None


def _masked(weight: Tensor, ids: Tensor, start: int, size: int) -> Tensor:
    """The operator's result, by torch's operations."""
    rows = weight.shape[0]
    local = _local(ids, rows, start)
    elsewhere = local == rows
    outside = (ids < 0) | (ids >= size)
    fill = weight.new_zeros(ids.shape).masked_fill_(outside, math.nan).unsqueeze(-1)
    if rows == 0:  # F.embedding needs a row
        return fill.repeat(*[1] * ids.dim(), weight.shape[1])
    found = F.embedding(local.masked_fill_(elsewhere, 0), weight)
    return torch.where(elsewhere.unsqueeze(-1), fill, found)


class _TorchLookup(torch.autograd.Function):
    """The operator on a device without a kernel for it."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, start: int, size: int, padding: int
    ) -> Tensor:
        found = _masked(weight, ids, start, size)
        _remember(ctx, (weight, ids, start, size, padding), found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _gradient(ctx, dy)


def _register_gradient() -> None:
    name = "deepspeed_autotp::lookup"
    torch.library.register_autograd(name, _gradient, setup_context=_remember)


operators.when_loaded(_register_gradient)
