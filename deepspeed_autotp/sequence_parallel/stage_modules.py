# SPDX-License-Identifier: Apache-2.0
"""Modules of a model between whose blocks the tokens are cut, and how they become so."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp._core import Plan
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.layers.grad_overlap import SharedInput
from deepspeed_autotp.layers.linear import Sharding, mixed_class
from deepspeed_autotp.sequence_parallel.stack import Argument, Stack, Stage


class StageModule(nn.Module):
    """A layer of a stack, mixed into its class.

    x  [N, H] of the first stage, else [n, H]
    y  [N, H] of the last stage, else [n, H]

    ``run`` is that of a stack, where torch.compile leaves all as it is: which tokens a rank has is
    known when it runs.
    """

    tp_stage: tuple[Stack, Stage, Callable[..., Any]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stack, stage, run = self.tp_stage
        if stack.is_idle:
            return super().forward(*args, **kwargs)
        return run(stack, stage, super().forward, args, kwargs, training=self.training)


class Inlet(nn.Module):
    """What is given all tokens where it begins, mixed into its class.

    x  [n, H]; the module's own forward is given [N, H]
    """

    tp_inlet: tuple[Stack, Argument, str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stack, given, name = self.tp_inlet
        whole = stack.enter(given.of(args, kwargs), name)
        args, named = given.replaced(args, kwargs, whole)
        return super().forward(*args, **named)


class Island(nn.Module):
    """What is given all tokens and gives all of them, mixed into its class.

    x  [n, H]; the module's own forward is given [N, H]
    y  [n, H]; the module's own forward gives [N, H]

    forward   all-gather of x
    backward  all-gather of dy
    """

    tp_island: tuple[Stack, Argument, str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stack, given, name = self.tp_island
        return stack.whole(name, given, super().forward, args, kwargs)


class Changes:
    """How modules are changed so that it can be undone: the two ways of a conversion, and the list
    of what undoes the rest."""

    def __init__(
        self,
        set_class: Callable[[nn.Module, type[nn.Module]], None],
        assign: Callable[[nn.Module, str, Any], None],
        undo: list[Callable[[], None]],
    ) -> None:
        self.set_class = set_class
        self.assign = assign
        self.undo = undo


def cut_tokens(
    plan: Plan,
    modules: Mapping[str, nn.Module],
    *,
    group: TPGroup,
    input: SharedInput,
    changes: Changes,
) -> None:
    """Let the stacks of ``plan`` cut their tokens, once its layers are sharded ones."""
    if not plan.stacks:
        return
    run = torch.compiler.disable(
        Stack.run, reason="tensor_parallel.sequence_parallel: layers run as they are in training"
    )
    for part in plan.stacks:
        stack = Stack(part.owner, group=group, input=input)
        for name in part.stages:
            stage = Stage(
                name=name,
                given=_first_argument(modules[name], name),
                is_first=name == part.stages[0],
                is_last=name == part.stages[-1],
            )
            changes.assign(modules[name], "tp_stage", (stack, stage, run))
            changes.set_class(modules[name], mixed_class(StageModule, modules[name]))
        gathering = ((part.inlets, "tp_inlet", Inlet), (part.islands, "tp_island", Island))
        for names, key, mixed in gathering:
            for name in names:
                given = _first_argument(modules[name], name)
                changes.assign(modules[name], key, (stack, given, name))
                changes.set_class(modules[name], mixed_class(mixed, modules[name]))
        for name in part.outlets:
            sharding: Sharding = vars(modules[name])["sharding"]
            total = _Total(stack, name)
            changes.assign(modules[name], "sharding", dataclasses.replace(sharding, total=total))
        # A model may call the owner without what it was called with itself.
        around = [modules[name] for name in _around(part.owner) if name in modules]
        changes.undo.extend(hook.remove for hook in stack.watch(modules[part.owner], around=around))


def _around(name: str) -> list[str]:
    """The names of the modules that hold this one, the model's, which is empty, last."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts) - 1, -1, -1)]


class _Total:
    """What a row layer does with its summand."""

    def __init__(self, stack: Stack, name: str) -> None:
        self._stack = stack
        self._name = name

    def __call__(self, y: Tensor, group: TPGroup) -> Tensor:
        return self._stack.total(y, group, self._name)


def _first_argument(module: nn.Module, name: str) -> Argument:
    """ValueError where a forward takes none."""
    for parameter in inspect.signature(module.forward).parameters.values():
        return Argument(parameter.name)
    raise ValueError(
        f"tensor_parallel.sequence_parallel is true, but the forward of {name} takes no argument "
        "whose tokens could be cut; leave the key out"
    )
