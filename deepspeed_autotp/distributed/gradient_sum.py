# SPDX-License-Identifier: Apache-2.0
"""Gradients of parameters that several ranks hold, each of which computes a part of the sum.

The sum is formed where the forward uses the parameter: what else its gradient comes from, as a
penalty on weights in the loss, is the same on all of these ranks and counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspeed_autotp._core import Entry, Kind
from deepspeed_autotp.distributed.model_groups import Subgroups
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.first_derivatives import once_differentiable


@dataclass(frozen=True, slots=True)
class GradientSum:
    """How the gradient of one parameter is summed over the ranks that hold it.

    runs     offset and length along ``dim`` of what this rank has in common with others; None
             where all ranks have all of the parameter
    holders  as of ``TPGroup.all_reduce_in``
    """

    group: TPGroup
    dim: int = 0
    runs: tuple[tuple[int, int], ...] | None = None
    holders: Subgroups = ()

    def __call__(self, gradient: Tensor) -> Tensor:
        """A new tensor. All ranks call it."""
        if self.runs is None:
            return self._in_float32(gradient, of_runs=False)
        if not torch.compiler.is_compiling():
            self.group.announce()  # also ranks without a shared run, as every collective
        summed = gradient.clone()
        for offset, length in self.runs:
            run = summed.narrow(self.dim, offset, length)
            run.copy_(self._in_float32(run, of_runs=True))
        return summed

    def _in_float32(self, gradient: Tensor, *, of_runs: bool) -> Tensor:
        """A 16-bit sum is rounded once, not once per rank."""
        is_short = gradient.dtype in (torch.float16, torch.bfloat16)
        own = gradient.float() if is_short else gradient.clone()
        if of_runs:
            summed = self.group.all_reduce_in(self.holders, own)
        else:
            summed = self.group.all_reduce(own)
        return summed.to(gradient.dtype)


def gradient_sum(entry: Entry, group: TPGroup) -> GradientSum | None:
    """None where nothing is to be summed. ``entry`` is that of the tensor, not of a second name."""
    if entry.kind is Kind.REPLICATED_SUM:
        return GradientSum(group)
    shared = [entry.shared(rank) for rank in range(group.size)]
    if not any(shared):
        return None
    runs = tuple((offset, length) for offset, length, _, _ in shared[group.rank])
    holders = tuple(_holders(entry, rank) for rank in range(group.size))
    return GradientSum(group, entry.dim, runs, holders)


def with_summed_gradient(parameter: Tensor, how: GradientSum) -> Tensor:
    """``parameter``, for any number of consumers; their gradient is summed over the ranks."""
    y: Tensor = _SumGradient.apply(parameter, how)  # type: ignore[no-untyped-call]
    return y


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, how: GradientSum) -> Tensor:
        ctx.how = how
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.how(gradient), None


def _holders(entry: Entry, rank: int) -> tuple[int, int]:
    """Lowest rank and number of the ranks that hold the same runs as ``rank``."""
    found = {(owner, holders) for _, _, owner, holders in entry.shared(rank)} or {(rank, 1)}
    assert len(found) == 1, f"rank {rank} shares runs of {entry.name} with several sets of ranks"
    return found.pop()
