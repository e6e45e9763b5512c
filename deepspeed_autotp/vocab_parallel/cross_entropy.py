# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a sharded vocabulary.

T is the number of tokens, V the vocabulary, R the ranks. With m_r the largest logit of rank r
and s_r = sum over its shard of exp(x - m_r), every rank has two values a token, and as a third
the logit of the label, on the one rank that holds it:

    loss = log(sum over r of s_r exp(m_r - max m)) + max m - x[label]
    dx   = dloss (exp(x - logsumexp) - [column is label])

forward   one all-gather of [3, T]; combined in rank order, so all ranks have the same bits
backward  no communication; the gradient is written over the logits
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from deepspeed_autotp.distributed.autograd_collectives import ShardLayout
from deepspeed_autotp.interop.first_derivatives import once_differentiable
from deepspeed_autotp.interop.torch_private import keeps_graph
from deepspeed_autotp.vocab_parallel.cross_entropy_kernels import (
    differentiate,
    differentiate_,
    statistics,
)


class Ranks(Protocol):
    """What the loss needs of a TP group."""

    rank: int
    size: int

    def all_gather(self, x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]: ...


@dataclass(frozen=True, slots=True)
class LossTask:
    """``start`` and ``size``: this rank's first column, and V. Others as in
    :func:`vocabulary_cross_entropy`."""

    start: int
    size: int
    group: Ranks
    ignore_index: int
    soft_cap: float
    overwrite: bool = False


def loss_task(
    layout: ShardLayout,
    group: Ranks,
    *,
    ignore_index: int,
    soft_cap: float,
    overwrite: bool = False,
) -> LossTask:
    """ValueError for columns that are not one run, and a soft cap that is none."""
    run = layout.runs[group.rank]
    if len(run) != 2:
        raise ValueError(f"layout: rank {group.rank} has the runs {run}, expected one run")
    if not soft_cap >= 0:
        raise ValueError(f"soft_cap: got {soft_cap}, expected a positive number, or 0 for none")
    return LossTask(run[0], layout.size, group, ignore_index, soft_cap, overwrite)


def vocabulary_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    layout: ShardLayout,
    group: Ranks,
    ignore_index: int = -100,
    overwrite: bool = True,
    soft_cap: float = 0.0,
) -> Tensor:
    """The loss of each token, [T], the same bits on every rank.

    logits        [T, V/R], this rank's columns: one run of the vocabulary, of any length
    labels        [T] int64, replicated; ``ignore_index`` gives loss and gradient 0
    overwrite     the gradient is written over the logits, unless the graph is retained
    soft_cap      c for a loss of c tanh(logits / c), without a pass of its own; 0 for none

    Sums are in float32, and in float64 for float64 logits; the result has that dtype. Another use
    of the same logits whose backward needs their values gets autograd's error once they are
    overwritten. ValueError for a label outside the vocabulary on the CPU; elsewhere, where a check
    would wait for the device, its loss and gradient are NaN.
    """
    task = loss_task(
        layout, group, ignore_index=ignore_index, soft_cap=soft_cap, overwrite=overwrite
    )
    width = layout.runs[group.rank][1]
    if logits.dim() != 2 or logits.shape[1] != width or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits and labels: got shapes {list(logits.shape)} and {list(labels.shape)}, "
            f"expected [tokens, {width}] and [tokens]"
        )
    losses: Tensor = _CrossEntropy.apply(logits, labels, task)  # type: ignore[no-untyped-call]
    return losses


def token_losses(logits: Tensor, labels: Tensor, task: LossTask) -> tuple[Tensor, Tensor]:
    """Losses and logsumexp of all columns, [T] each, the same bits on every rank. All call it."""
    ignored = labels == task.ignore_index
    outside = ((labels < 0) | (labels >= task.size)) & ~ignored
    if labels.device.type == "cpu" and bool(outside.any()):
        raise ValueError(
            f"labels: got {int(labels[outside][0])}, expected 0 to {task.size - 1}, or "
            f"{task.ignore_index} for a token without a loss"
        )
    mine = statistics(logits, labels - task.start, cap=task.soft_cap)
    logsumexp, target = _combined(task.group.all_gather(mine, [mine.shape] * task.group.size))
    logsumexp.masked_fill_(outside, math.nan)
    return (logsumexp - target).masked_fill_(ignored, 0), logsumexp


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, task: LossTask) -> Tensor:
        losses, logsumexp = token_losses(logits, labels, task)
        ctx.task = task
        ctx.save_for_backward(logits, labels, logsumexp)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, logsumexp = ctx.saved_tensors
        task: LossTask = ctx.task
        # A retained graph may run again, and would read gradients where logits were.
        retained = keeps_graph()
        scale = dlosses.masked_fill(labels == task.ignore_index, 0)
        columns = labels - task.start
        if retained or not task.overwrite:
            gradient = differentiate(logits, logsumexp, columns, scale, cap=task.soft_cap)
            return gradient, None, None
        differentiate_(logits, logsumexp, columns, scale, cap=task.soft_cap)
        return logits, None, None


def _combined(ranks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Log of the sum of exponentials, and the label's logit, from every rank's statistics."""
    largest = ranks[0][0]
    for part in ranks[1:]:
        largest = torch.maximum(largest, part[0])
    total, target = torch.zeros_like(largest), torch.zeros_like(largest)
    for part in ranks:
        total += part[1] * (part[0] - largest).exp_()
        target += part[2]
    return total.log_().add_(largest), target
