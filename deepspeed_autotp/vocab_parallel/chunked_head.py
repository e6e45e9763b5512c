# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities, entropy and top-1 from hidden states and this rank's rows of the head.

T tokens, H hidden, V the vocabulary, R ranks. With z = f(x w'), f a scale, a soft cap and a
temperature, the columns of a rank have for each token

    m = max z    s = sum exp(z - m)    e = sum z exp(z - m)    q = sum exp(z - m)^2    u = sum z
    the z of the label, where it is among them, and the largest z of a column before it

from which those of all ranks follow. Logits are there for a tile of tokens and columns at a time.

forward   one all-gather of [7, T]
backward  the tiles are formed anew; one all-reduce of dx [T, H] in float32
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed_autotp.distributed.autograd_collectives import ShardLayout
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.first_derivatives import once_differentiable
from deepspeed_autotp.vocab_parallel.head_product import compute_dtype, mm_in_float32

# Tokens of a tile, and its bytes in float32, of which there are some copies at once.
_TOKENS = 4096
_CPU_TILE = 8 << 20
_DEVICE_TILE = 256 << 20


@dataclass(frozen=True, slots=True)
class HeadTask:
    """z = soft_cap tanh(scale (x w' + b) / soft_cap) / temperature; without a soft cap, 0, no
    tanh."""

    layout: ShardLayout
    group: TPGroup
    temperature: float = 1.0
    soft_cap: float = 0.0
    scale: float = 1.0

    def logits(self, y: Tensor) -> tuple[Tensor, Tensor | float]:
        """z in float32, and dz/dy."""
        z, slope = y.float() * self.scale, self.scale / self.temperature
        if not self.soft_cap:
            return z.div_(self.temperature), slope
        tanh = z.div_(self.soft_cap).tanh_()
        return tanh * (self.soft_cap / self.temperature), (1 - tanh.square()).mul_(slope)


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """[T] each, the same bits on every rank; ``log_probs`` and ``entropy`` have gradients."""

    log_probs: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor


def token_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, task: HeadTask
) -> TokenStatistics:
    """What is said of each label, and of the distribution that it is from.

    hidden  [T, H]    replicated
    weight  [V/R, H]  this rank's rows, one run of the vocabulary
    bias    [V/R]     or None
    labels  [T]       replicated, in [0, V)
    """
    found = _Head.apply(hidden, weight, bias, labels, task)  # type: ignore[no-untyped-call]
    return TokenStatistics(*found)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, task: HeadTask
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.task, ctx.dtype = task, compute_dtype(x)
        mine = _nothing(len(labels), x.device)
        for rows, columns in _tiles(len(labels), w.shape[0], x.device):
            z, _ = task.logits(_products(x, w, b, rows, columns, ctx.dtype)[0])
            found = _statistics(z, labels[rows] - _first(task) - columns.start)
            mine[:, rows] = _merged(torch.stack([mine[:, rows], found]))
        every = task.group.all_gather(mine, [mine.shape] * task.group.size)
        log_z, fields = _finished(_merged(torch.stack(every)), task.layout.size)
        ctx.save_for_backward(x, w, b, labels, log_z, fields[1])
        ctx.mark_non_differentiable(*fields[2:])
        return fields

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlog_probs: Tensor | None, dentropy: Tensor | None, *unused: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, w, b, labels, log_z, entropy = ctx.saved_tensors
        task: HeadTask = ctx.task
        wanted = zip((x, w, b), ctx.needs_input_grad[:3], strict=True)
        dx, dw, db = (
            torch.zeros_like(p, dtype=torch.float32) if is_wanted else None
            for p, is_wanted in wanted
        )
        nothing = torch.zeros_like(log_z)
        given = [nothing if d is None else d.float() for d in (dlog_probs, dentropy)]
        for rows, columns in _tiles(len(labels), w.shape[0], x.device):
            y, xs, ws = _products(x, w, b, rows, columns, ctx.dtype)
            z, slope = task.logits(y)
            log_p = z.sub_(log_z[rows].unsqueeze(1))
            dz = _gradient(
                log_p,
                labels[rows] - _first(task) - columns.start,
                *(d[rows].unsqueeze(1) for d in (*given, entropy)),
            )
            dy = dz.mul_(slope).to(ctx.dtype)
            if dx is not None:
                dx[rows] += mm_in_float32(dy, ws)
            if dw is not None:
                dw[columns] += mm_in_float32(dy.t(), xs)
            if db is not None:
                db[columns] += dy.sum(0, dtype=torch.float32)
        if dx is not None:
            dx = task.group.all_reduce(dx)
        grads = zip((dx, dw, db), (x, w, b), strict=True)
        return (*(None if d is None else d.to(p.dtype) for d, p in grads), None, None)


def _first(task: HeadTask) -> int:
    return task.layout.runs[task.group.rank][0]


def _nothing(tokens: int, device: torch.device) -> Tensor:
    """The statistics of no column."""
    found = torch.zeros(7, tokens, device=device)
    found[0].fill_(-math.inf)
    found[6].fill_(-math.inf)
    return found


def _statistics(z: Tensor, columns: Tensor) -> Tensor:
    """m, s, e, q, u, the label's z or 0, and the largest z before the label: [7, tokens]."""
    width = z.shape[1]
    elsewhere = (columns < 0) | (columns >= width)
    target = z.gather(1, columns.clamp(0, width - 1).unsqueeze(1)).squeeze(1)
    later = torch.arange(width, device=z.device) >= columns.unsqueeze(1)
    before = z.masked_fill(later, -math.inf).amax(1)
    m, u = z.amax(1), z.sum(1)
    exp = torch.exp(z - m.unsqueeze(1))
    s, q, e = exp.sum(1), exp.square().sum(1), z.mul_(exp).sum(1)
    return torch.stack([m, s, e, q, u, target.masked_fill(elsewhere, 0), before])


def _merged(parts: Tensor) -> Tensor:
    """The statistics of all columns from those of some columns each: [n, 7, T] -> [7, T]."""
    m = parts[:, 0].amax(0)
    rescale = torch.exp(parts[:, 0] - m)
    s, e = (parts[:, 1] * rescale).sum(0), (parts[:, 2] * rescale).sum(0)
    q = (parts[:, 3] * rescale.square()).sum(0)
    return torch.stack([m, s, e, q, parts[:, 4].sum(0), parts[:, 5].sum(0), parts[:, 6].amax(0)])


def _finished(found: Tensor, size: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Log of the sum of exponentials, and the fields of TokenStatistics."""
    m, s, e, q, u, target, before = found
    log_z = m + torch.log(s)
    is_top1 = (target >= m) & (target > before)
    rest = (log_z - e / s, torch.log(q) - 2 * torch.log(s), u / size, is_top1)
    return log_z, (target - log_z, *rest)


def _gradient(
    log_p: Tensor, columns: Tensor, dlog_probs: Tensor, dentropy: Tensor, entropy: Tensor
) -> Tensor:
    """dz = dlog_probs ([column is the label's] - p) - dentropy p (log p + entropy)."""
    p = log_p.exp()
    dz = log_p.add_(entropy).mul_(-dentropy).sub_(dlog_probs).mul_(p)
    width = dz.shape[1]
    elsewhere = ((columns < 0) | (columns >= width)).unsqueeze(1)
    at = columns.clamp(0, width - 1).unsqueeze(1)
    return dz.scatter_add_(1, at, dlog_probs.masked_fill(elsewhere, 0))


def _products(
    x: Tensor, w: Tensor, b: Tensor | None, rows: slice, columns: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x w' + b of a tile, and its two factors, in ``dtype``."""
    xs, ws = x[rows].to(dtype), w[columns].to(dtype)
    return F.linear(xs, ws, None if b is None else b[columns].to(dtype)), xs, ws


def _tiles(tokens: int, width: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the tiles of [tokens, width]."""
    size = _CPU_TILE if device.type == "cpu" else _DEVICE_TILE
    for row in range(0, tokens, _TOKENS):
        rows = slice(row, min(row + _TOKENS, tokens))
        step = max(1, size // (4 * (rows.stop - rows.start)))
        for column in range(0, width, step):
            yield rows, slice(column, min(column + step, width))
