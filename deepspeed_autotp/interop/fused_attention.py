# SPDX-License-Identifier: Apache-2.0
"""Attention as the fused kernels of a GPU keep it: no scores, whatever the mask and the heads.

On a CPU torch has a fused kernel for some cases only. In others it computes the scores, which a
GPU keeps in no memory (FlashAttention, Dao et al. 2022; memory-efficient attention, Rabe and Staats
2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed_autotp.interop.first_derivatives import once_differentiable


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within it ``scaled_dot_product_attention`` of fake tensors has the sizes of a fused kernel;
    there are no values. The function is replaced: a mode of torch does not reach what is run again
    in the backward pass."""
    with mock.patch.object(F, "scaled_dot_product_attention", _attention):
        yield


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    y: Tensor = _Attention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]
    return y


class _Attention(torch.autograd.Function):
    """query [..., L, E], key [..., S, E], value [..., S, V] -> [..., L, V].

    Kept are these, the mask, the output and a float32 for each query of each head.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        heads, rows = q.shape[-3] if q.dim() > 3 else 1, q.shape[-2]
        # The layout of the kernels: that of [..., L, heads, V].
        if q.dim() > 3:
            out = q.new_empty(*q.shape[:-3], rows, heads, v.shape[-1]).transpose(-3, -2)
        else:
            out = q.new_empty(*q.shape[:-1], v.shape[-1])
        sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return (*(torch.empty_like(x) for x in (q, k, v)), None)
