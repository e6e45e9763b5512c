# SPDX-License-Identifier: Apache-2.0
"""Labels for small logits, the loss that models form from both, and its errors on shards."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed_autotp.vocab_parallel.logits import logits_from_shard
from tests.support.column_shards import even_widths, layout_of, own_columns, world_group

Use = Callable[[Tensor, Tensor], Tensor]
Recorded = TypeVar("Recorded")
ROWS, SIZE = 5, 13


def labels() -> Tensor:
    drawn = torch.randint(0, SIZE, (2, ROWS), generator=torch.Generator().manual_seed(3))
    drawn[0, 1] = -100
    return drawn


class _Identity(torch.autograd.Function):
    """Gives its input back, as hooks on a module's backward do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def identity(x: Tensor) -> Tensor:
    y: Tensor = _Identity.apply(x)
    return y


def flat(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(x.view(-1, x.size(-1)), y.view(-1), **options)


def against_full(
    use: Use, full: Tensor, recording: AbstractContextManager[list[Recorded]]
) -> tuple[float, float, list[Recorded]]:
    """Errors of value and gradient of ``use`` on sharded logits; what was recorded meanwhile."""
    full.requires_grad_()
    expected = use(full * 1, labels())
    expected.backward()
    assert full.grad is not None
    layout = layout_of(even_widths(SIZE))
    shard = own_columns(full, layout)
    with recording as recorded:
        got = use(logits_from_shard(shard * 1, layout, world_group()), labels())
        got.backward()
    assert shard.grad is not None and type(shard.grad) is Tensor
    gradient = (shard.grad - own_columns(full.grad, layout, leaf=False)).abs().max()
    return abs(float(got.detach() - expected.detach())), float(gradient), recorded
