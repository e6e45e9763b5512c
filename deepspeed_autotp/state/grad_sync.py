# SPDX-License-Identifier: Apache-2.0
"""Gradients of parameters that several ranks hold, each of which computes a part of the sum."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepspeed_autotp._core import Entry, Kind, Plan
from deepspeed_autotp.distributed.process_group import TPGroup

GradHook = Callable[[Tensor | None], Tensor | None]


def register_grad_hooks(
    plan: Plan, parameters: Sequence[nn.Parameter], group: TPGroup
) -> Iterator[RemovableHandle]:
    """Register hooks that all-reduce such gradients, each before the gradient reaches ``.grad``.

    ``parameters[i]`` is the tensor of ``plan.entries[i]``. Each is registered when it is asked for.
    """
    for entry, parameter in zip(plan.entries, parameters, strict=True):
        hook = None if entry.is_tied else grad_hook(entry, group)
        if hook is None or not parameter.is_floating_point():
            continue
        yield hook_gradient(parameter, hook)


def hook_gradient(parameter: Tensor, hook: GradHook) -> RemovableHandle:
    """Register a hook, which stays when a frozen parameter is unfrozen later."""
    frozen = not parameter.requires_grad
    parameter.requires_grad_(True)  # registering needs it
    made: RemovableHandle = parameter.register_hook(hook)
    if frozen:
        parameter.requires_grad_(False)
    return made


def open_subgroups(plan: Plan, group: TPGroup) -> None:
    """Make the process groups that the hooks of a plan use. All ranks call it, before a hook is
    called."""
    shared = [e for e in plan.entries if not e.is_tied and _is_shared(e, group.size)]
    group.open_subgroups([_holders(entry, group.size) for entry in shared])


def grad_hook(entry: Entry, group: TPGroup) -> GradHook | None:
    """What sums the gradient of a parameter over the TP ranks that hold it; None where nothing is
    to be summed."""
    if entry.kind is Kind.REPLICATED_SUM:
        return _AllReduceGrad(group, entry)
    if _is_shared(entry, group.size):
        return _AllReduceSharedRuns(group, entry)
    return None


def _in_float32(gradient: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce a 16-bit gradient in float32: its sum is rounded once, not once per rank."""
    if gradient.dtype in (torch.float16, torch.bfloat16):
        return reduce(gradient.float()).to(gradient.dtype)
    return reduce(gradient.clone())


def _refuse_second_order(gradient: Tensor, name: str) -> None:
    """RuntimeError where the all-reduce itself would have to be differentiated."""
    if gradient.requires_grad:
        raise RuntimeError(
            f"the gradient of {name} is all-reduced over the TP group, which cannot be "
            "differentiated again; call backward without create_graph=True"
        )


class _AllReduceGrad:
    """Sum the gradient of a replicated parameter that every rank uses for its own shard."""

    def __init__(self, group: TPGroup, entry: Entry) -> None:
        self._group = group
        self._name = entry.name

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:  # a layer that was not called, beside others of its input
            return None
        _refuse_second_order(gradient, self._name)
        return _in_float32(gradient, self._group.all_reduce)


class _AllReduceSharedRuns:
    """Sum the gradient of the runs that several ranks hold, as with few key/value heads."""

    def __init__(self, group: TPGroup, entry: Entry) -> None:
        self._group = group
        self._name = entry.name
        self._dim = entry.dim
        self._runs = entry.shared(group.rank)
        self._holders = _holders(entry, group.size)

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:  # a layer that was not called, beside others of its input
            return None
        _refuse_second_order(gradient, self._name)
        self._group.announce()  # also ranks without a shared run, as every collective
        summed = gradient.clone()
        for offset, length, _, _ in self._runs:
            run = summed.narrow(self._dim, offset, length)
            reduce = functools.partial(self._group.all_reduce_in, self._holders)
            run.copy_(_in_float32(run, reduce))
        return summed


def _is_shared(entry: Entry, ranks: int) -> bool:
    """Whether several ranks hold the same runs of a parameter, and not all of all of it."""
    return entry.kind is not Kind.REPLICATED_SUM and any(map(entry.shared, range(ranks)))


def _holders(entry: Entry, ranks: int) -> tuple[tuple[int, int], ...]:
    return tuple(_holders_of(entry, rank) for rank in range(ranks))


def _holders_of(entry: Entry, rank: int) -> tuple[int, int]:
    """Lowest rank and number of the ranks that hold the same runs as ``rank``."""
    found = {(owner, holders) for _, _, owner, holders in entry.shared(rank)} or {(rank, 1)}
    assert len(found) == 1, f"rank {rank} shares runs of {entry.name} with several sets of ranks"
    return found.pop()
