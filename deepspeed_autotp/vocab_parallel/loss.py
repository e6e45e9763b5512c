# SPDX-License-Identifier: Apache-2.0
"""The loss over a sharded vocabulary for models whose loss this package does not set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp.distributed.autograd_collectives import ShardLayout
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.vocab_parallel.cross_entropy import Ranks, vocabulary_cross_entropy

_REDUCTIONS = ("none", "mean", "sum")


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | TPGroup,
    *,
    widths: Sequence[int] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    soft_cap: float = 0.0,
    overwrite_logits: bool = False,
) -> Tensor:
    """Cross-entropy of logits whose vocabulary is sharded, as ``F.cross_entropy`` of all of them.

    logits            [..., V/R], this rank's columns: as a column layer without ``gather_output``
                      gives them, ranks one after the other. x below, in any floating dtype
    labels            [...] int64, the same on every rank, in [0, V), or ``ignore_index``
    group             the TP group: a process group, or tensor_parallel(model).group
    widths            columns of every rank, in rank order; default: as many as this rank has
    reduction         "mean" over the labels that are not ignored, "sum", or "none": [...]
    soft_cap          c, to take the loss of c tanh(x / c); 0 for none
    overwrite_logits  the backward writes the gradient over the logits, which saves memory; what
                      else reads them afterwards reads gradients

        loss = log(sum over ranks of s_r exp(m_r - m)) + m - x[label],
        m_r = max x on rank r, s_r = sum over its columns of exp(x - m_r), m = max of all m_r

    In nats, in float32, or float64 for float64 logits; the same bits on every rank, of which each
    calls it. One all-gather of three numbers a token, and nothing in the backward: the gradient of
    the head's input has to be summed over the ranks, as a column layer does.
    ValueError for arguments that do not fit, and on the CPU for labels outside of [0, V); on other
    devices their loss is NaN.
    """
    _check(group, reduction)
    ranks = group if isinstance(group, TPGroup) else _Ranks(group)
    layout = _layout(logits, labels, ranks, widths)
    losses = vocabulary_cross_entropy(
        logits.reshape(labels.numel(), logits.shape[-1]),
        labels.reshape(-1),
        layout=layout,
        group=ranks,
        ignore_index=ignore_index,
        overwrite=overwrite_logits,
        soft_cap=soft_cap,
    )
    return _reduced(losses.view(labels.shape), labels != ignore_index, reduction)


class _Ranks:
    """A process group of the user, beside which nothing is made."""

    def __init__(self, handle: dist.ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(handle), dist.get_world_size(handle)
        self._handle = handle

    def all_gather(self, x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        received = [x.new_empty(shape) for shape in shapes]
        dist.all_gather(received, x.contiguous(), group=self._handle)
        return received


def _reduced(losses: Tensor, counts: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / counts.sum() if reduction == "mean" else total


def _check(group: object, reduction: str) -> None:
    if not isinstance(group, (TPGroup, dist.ProcessGroup)):
        raise ValueError(f"group: got {type(group).__name__}, expected a process group")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {', '.join(_REDUCTIONS)}")


def _layout(
    logits: Tensor, labels: Tensor, group: Ranks, widths: Sequence[int] | None
) -> ShardLayout:
    """One run a rank, one after the other; ValueError where the arguments do not fit."""
    if not logits.is_floating_point() or labels.dtype != torch.int64:
        raise ValueError(
            f"logits and labels: got {logits.dtype} and {labels.dtype}, expected a floating dtype "
            "and torch.int64"
        )
    if logits.dim() == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits and labels: got shapes {list(logits.shape)} and {list(labels.shape)}, "
            "expected [..., columns] and [...]"
        )
    columns = logits.shape[-1]
    every = [columns] * group.size if widths is None else list(widths)
    if len(every) != group.size or min(every) < 0 or every[group.rank] != columns:
        raise ValueError(
            f"widths: got {every} and logits with {columns} columns on rank {group.rank} of "
            f"{group.size}, expected the columns of every rank"
        )
    starts = [sum(every[:rank]) for rank in range(len(every))]
    runs = tuple(zip(starts, every, strict=True))
    return ShardLayout(size=sum(every), widths=tuple(every), runs=runs)
