# SPDX-License-Identifier: Apache-2.0
"""Which gradients are summed over the TP group, and where: in general where the forward uses the
parameter (layers/summed_gradients.py), else by a hook on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepspeed_autotp._core import Plan
from deepspeed_autotp.distributed.gradient_sum import GradientSum, gradient_sum
from deepspeed_autotp.distributed.process_group import TPGroup

GradHook = Callable[[Tensor | None], Tensor | None]


def sums_at_use(plan: Plan, group: TPGroup) -> dict[int, GradientSum]:
    """By entry, also that of a tensor's second name."""
    return _sums(plan, group, hooked=False)


def grad_hooks(plan: Plan, group: TPGroup) -> dict[int, GradHook]:
    """What sums the gradients of parameters that not only modules with a class of the package use.
    By entry, also that of a tensor's second name."""
    sums = _sums(plan, group, hooked=True)
    return {i: _SumHook(plan.entries[i].name, how) for i, how in sums.items()}


def register_grad_hooks(
    plan: Plan, parameters: Sequence[nn.Parameter], group: TPGroup
) -> Iterator[RemovableHandle]:
    """Register the hooks, each when it is asked for; ``parameters[i]`` is the tensor of
    ``plan.entries[i]``."""
    for index, hook in grad_hooks(plan, group).items():
        if not plan.entries[index].is_tied and parameters[index].is_floating_point():
            yield hook_gradient(parameters[index], hook)


def hook_gradient(parameter: Tensor, hook: GradHook) -> RemovableHandle:
    """Register a hook, which stays when a frozen parameter is unfrozen later."""
    frozen = not parameter.requires_grad
    parameter.requires_grad_(True)  # registering needs it
    made: RemovableHandle = parameter.register_hook(hook)
    if frozen:
        parameter.requires_grad_(False)
    return made


def open_subgroups(plan: Plan, group: TPGroup) -> None:
    """Make the process groups that the sums of a plan use. All ranks call it, before a sum."""
    sums = [how for hooked in (False, True) for how in _sums(plan, group, hooked=hooked).values()]
    group.open_subgroups([how.holders for how in sums if how.runs is not None])


class _SumHook:
    def __init__(self, name: str, how: GradientSum) -> None:
        self._name = name
        self._sum = how

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:  # a layer that was not called, beside others of its input
            return None
        if gradient.requires_grad:
            raise RuntimeError(
                f"the gradient of {self._name} is all-reduced over the TP group, which cannot be "
                "differentiated again; call backward without create_graph=True"
            )
        return self._sum(gradient)


def _sums(plan: Plan, group: TPGroup, *, hooked: bool) -> dict[int, GradientSum]:
    """Those of hooks, or the others. Hooks have the tensors that the model itself has, whose class
    is what a checkpoint names, and those of layers whose full weight others read."""
    entries = plan.entries
    tensors = [entry.tied_to if entry.is_tied else i for i, entry in enumerate(entries)]
    owners = {"", *(layer.module for layer in plan.layers if layer.gathers_weight)}
    named = zip(tensors, entries, strict=True)
    of_hooks = {tensor for tensor, entry in named if entry.name.rpartition(".")[0] in owners}
    found = (
        (i, gradient_sum(entries[tensor], group))
        for i, tensor in enumerate(tensors)
        if (tensor in of_hooks) == hooked
    )
    return {i: how for i, how in found if how is not None}
