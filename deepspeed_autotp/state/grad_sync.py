# SPDX-License-Identifier: Apache-2.0
"""Gradients of which every rank computes a part, summed over the ranks that hold the weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepspeed_autotp._core import Entry, Kind, Plan
from deepspeed_autotp.distributed.process_group import TPGroup


def hook_gradients(
    plan: Plan, parameters: Sequence[nn.Parameter], group: TPGroup
) -> list[RemovableHandle]:
    """Hooks that sum what has to be summed, each before the gradient reaches ``.grad``.

    ``parameters[i]`` is the tensor of ``plan.entries[i]``.
    """
    hooks = []
    for entry, parameter in zip(plan.entries, parameters, strict=True):
        hook = None if entry.is_tied else _hook(entry, group)
        if hook is None or not parameter.is_floating_point():
            continue
        frozen = not parameter.requires_grad
        # A hook needs requires_grad when it is made and stays when a frozen weight thaws later.
        parameter.requires_grad_(True)
        hooks.append(parameter.register_hook(hook))
        if frozen:
            parameter.requires_grad_(False)
    return hooks


def _hook(entry: Entry, group: TPGroup) -> Callable[[Tensor | None], Tensor | None] | None:
    if entry.kind is Kind.REPLICATED_SUM:
        return _SumGradient(group, entry)
    if any(entry.shared(rank) for rank in range(group.size)):
        return _SumSharedRuns(group, entry)
    return None


def _in_float32(gradient: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce a 16-bit gradient in float32: its sum is rounded once, not once per rank."""
    if gradient.dtype in (torch.float16, torch.bfloat16):
        return reduce(gradient.float()).to(gradient.dtype)
    return reduce(gradient.clone())


def _refuse_second_order(gradient: Tensor, name: str) -> None:
    """RuntimeError where the sum itself would have to be differentiated."""
    if gradient.requires_grad:
        raise RuntimeError(
            f"the gradient of {name} is summed over the tensor-parallel ranks, and cannot be "
            "differentiated again: run backward without create_graph"
        )


class _SumGradient:
    """Sum the gradient of a parameter that every rank holds but uses for its own part."""

    def __init__(self, group: TPGroup, entry: Entry) -> None:
        self._group = group
        self._name = entry.name

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:  # a layer that was not called, beside others of its input
            return None
        _refuse_second_order(gradient, self._name)
        return _in_float32(gradient, self._group.all_reduce)


class _SumSharedRuns:
    """Sum the gradient of the runs that several ranks hold, as with few key/value heads."""

    def __init__(self, group: TPGroup, entry: Entry) -> None:
        self._group = group
        self._name = entry.name
        self._dim = entry.dim
        self._runs = entry.shared(group.rank)
        self._blocks = tuple(_block(entry, rank) for rank in range(group.size))

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:  # a layer that was not called, beside others of its input
            return None
        _refuse_second_order(gradient, self._name)
        self._group.step()  # ranks without a shared run keep in step with the others
        block = self._group.block(self._blocks)
        total = gradient.clone()
        for offset, length, _, _ in self._runs:
            part = total.narrow(self._dim, offset, length)
            reduce = functools.partial(self._group.sum_in, block)
            part.copy_(_in_float32(part, reduce))
        return total


def _block(entry: Entry, rank: int) -> tuple[int, int]:
    """First rank and number of the ranks that hold the same runs as ``rank``."""
    blocks = {(owner, holders) for _, _, owner, holders in entry.shared(rank)} or {(rank, 1)}
    assert len(blocks) == 1, f"rank {rank} shares runs of {entry.name} with several sets of ranks"
    return blocks.pop()
