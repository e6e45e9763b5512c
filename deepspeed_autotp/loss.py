# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a vocabulary that is cut over the ranks.

T is the number of tokens, V the vocabulary, R the ranks. With m_r the largest logit of rank r
and s_r = sum over its part of exp(x - m_r), every rank's part gives two numbers a token, and
a third is the logit of the label on the one rank that holds it:

    loss = log(sum over r of s_r exp(m_r - max m)) + max m - x[label]
    dx   = dloss (exp(x - logsumexp) - [column is label])

forward   one all-gather of [3, T]; combined in rank order, so all ranks have the same bits
backward  no communication; the gradient takes the place of the logits
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepspeed_autotp.collectives import Parts
from deepspeed_autotp.group import TPGroup

# Bytes of the one temporary, in the type that is summed in. Three passes go over it, so on a host
# it should stay in a cache: with 1024 tokens and 32768 columns on one core, 64 MiB take twice as
# long as 4 MiB, and 256 KiB a sixth longer. Elsewhere starting a kernel costs as much time as
# reading some MiB does, so a piece has to be larger to hide that.
_HOST_CHUNK = 4 << 20
_DEVICE_CHUNK = 64 << 20


@dataclass(frozen=True, slots=True)
class _Task:
    """``start`` and ``size``: this rank's first column, and V."""

    start: int
    size: int
    group: TPGroup
    ignore_index: int
    overwrite: Callable[[], bool]


def vocabulary_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    parts: Parts,
    group: TPGroup,
    ignore_index: int = -100,
    overwrite: Callable[[], bool] = lambda: True,
) -> Tensor:
    """The loss of each token, [T], the same bits on every rank.

    logits        [T, V/R], this rank's columns: one run of the vocabulary, of any length
    labels        [T] int64, the same on every rank; ``ignore_index`` gives loss and gradient 0
    overwrite     asked in the backward whether the gradient may take the place of the logits;
                  a graph that is retained keeps its logits in any case

    Sums are formed in float32, and in float64 for float64 logits; the result has that type.
    Another use of the same logits whose backward needs their values gets autograd's error once
    they are overwritten. ValueError for a label outside the vocabulary on a host; elsewhere,
    where looking would wait for the device, its loss and gradient are NaN.
    """
    run = parts.runs[group.rank]
    if len(run) != 2:
        raise ValueError(f"the vocabulary part of rank {group.rank} is {run}, expected one run")
    if logits.dim() != 2 or logits.shape[1] != run[1] or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits have shape {list(logits.shape)} and labels {list(labels.shape)}, expected "
            f"[tokens, {run[1]}] and [tokens]"
        )
    task = _Task(run[0], parts.size, group, ignore_index, overwrite)
    losses: Tensor = _CrossEntropy.apply(logits, labels, task)  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, task: _Task) -> Tensor:
        ignored = labels == task.ignore_index
        outside = ((labels < 0) | (labels >= task.size)) & ~ignored
        if labels.device.type == "cpu" and bool(outside.any()):
            raise ValueError(
                f"labels: got {int(labels[outside][0])}, expected 0 to {task.size - 1}, or "
                f"{task.ignore_index} for a token without a loss"
            )
        mine = _statistics(logits, labels - task.start)
        logsumexp, target = _combined(task.group.all_gather(mine, [mine.shape] * task.group.size))
        logsumexp.masked_fill_(outside, math.nan)
        ctx.task = task
        ctx.save_for_backward(logits, labels, logsumexp)
        return (logsumexp - target).masked_fill_(ignored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, logsumexp = ctx.saved_tensors
        task: _Task = ctx.task
        # A retained graph may be walked again, and would find gradients where logits were.
        retained = torch._C._autograd._get_current_graph_task_keep_graph()
        gradient = logits if not retained and task.overwrite() else torch.empty_like(logits)
        scale = dlosses.masked_fill(labels == task.ignore_index, 0)
        _differentiate(logits, logsumexp, labels - task.start, scale, out=gradient)
        return gradient, None, None


def _statistics(logits: Tensor, columns: Tensor) -> Tensor:
    """[3, T]: the largest logit, the sum of exponentials below it, and the label's logit or 0.

    ``columns`` are the labels counted from this rank's first column.
    """
    width = logits.shape[1]
    found = logits.new_zeros(3, logits.shape[0], dtype=_summed(logits))
    found[0].fill_(-math.inf)
    if width == 0:
        return found
    elsewhere = (columns < 0) | (columns >= width)
    column = columns.masked_fill(elsewhere, 0).unsqueeze(1)
    for rows, space in _chunks(logits):
        x = logits[rows]
        largest = torch.amax(x, 1, keepdim=True).to(found.dtype)
        found[0, rows] = largest.squeeze(1)
        # A row of -inf alone has no exponentials; less its own maximum it would be NaN.
        torch.sub(x, largest.masked_fill_(largest == -math.inf, 0), out=space)
        found[1, rows] = space.exp_().sum(1)
        found[2, rows] = x.gather(1, column[rows]).squeeze(1).to(found.dtype)
    found[2].masked_fill_(elsewhere, 0)
    return found


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


def _differentiate(
    logits: Tensor, logsumexp: Tensor, columns: Tensor, scale: Tensor, *, out: Tensor
) -> None:
    """out = scale (exp(logits - logsumexp) - [column is the label's]); ``out`` may be ``logits``.

    A row whose scale is 0 is 0, whatever its logits are.
    """
    width = logits.shape[1]
    if width == 0:
        return
    here = ((columns >= 0) & (columns < width)).to(logsumexp.dtype).neg_().unsqueeze(1)
    column = columns.clamp(0, width - 1).unsqueeze(1)
    nothing = (scale == 0).unsqueeze(1)
    for rows, space in _chunks(logits):
        torch.sub(logits[rows], logsumexp[rows].unsqueeze(1), out=space).exp_()
        space.scatter_add_(1, column[rows], here[rows]).mul_(scale[rows].unsqueeze(1))
        out[rows] = space.masked_fill_(nothing[rows], 0)


def _summed(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of ``logits``, and the same space for each of them in the type of sums."""
    tokens, width = logits.shape
    dtype = _summed(logits)
    size = _HOST_CHUNK if logits.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, min(size // (width * dtype.itemsize), tokens))
    space = logits.new_empty(step, width, dtype=dtype)
    for first in range(0, tokens, step):
        rows = slice(first, min(first + step, tokens))
        yield rows, space[: rows.stop - first]
