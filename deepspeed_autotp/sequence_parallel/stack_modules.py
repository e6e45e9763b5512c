# SPDX-License-Identifier: Apache-2.0
"""The modules of a stack whose tokens are sharded, and how a model's modules become these."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp._core import Plan
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.module_state import set_state, state_of
from deepspeed_autotp.layers.class_swap import mix_in
from deepspeed_autotp.layers.forward_context import ForwardContext
from deepspeed_autotp.layers.layer_sharding import sharding_of
from deepspeed_autotp.sequence_parallel.hidden_states import HiddenStates
from deepspeed_autotp.sequence_parallel.own_tokens import NormOfOwnTokens
from deepspeed_autotp.sequence_parallel.stack import FirstArgument, Stack, StackLayer


@dataclass(frozen=True, slots=True)
class _LayerState:
    """What a layer of a stack knows of it. ``run_uncompiled`` is ``Stack.run``."""

    stack: Stack
    layer: StackLayer
    run_uncompiled: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _ModuleState:
    """What a module within a layer of a stack knows of it."""

    stack: Stack
    argument: FirstArgument
    name: str


class SequenceParallelLayer(nn.Module):
    """A layer of a stack, mixed into its class.

    x  [N, H] of the first layer, else [n, H]
    y  [N, H] of the last layer, else [n, H]
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        part = state_of(self, _LayerState)
        if part.stack.is_idle:
            return super().forward(*args, **kwargs)
        # RNG states are exchanged at each norm: what is left of a layer would be many graphs.
        if torch.compiler.is_compiling() and part.stack.draws:
            return part.run_uncompiled(part.stack, part.layer, super().forward, args, kwargs)
        return part.stack.run(part.layer, super().forward, args, kwargs)


class GatherInput(nn.Module):
    """A module that gathers all tokens at its input, mixed into its class.

    x  [n, H]; the module's own forward is given [N, H]
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        part = state_of(self, _ModuleState)
        full = part.stack.gather_input(part.argument.of(args, kwargs), part.name)
        args, named = part.argument.replaced(args, kwargs, full)
        return super().forward(*args, **named)


class GatherInputScatterOutput(nn.Module):
    """A module that runs on all tokens, mixed into its class.

    x  [n, H]; the module's own forward is given [N, H]
    y  [n, H]; the module's own forward gives [N, H]

    forward   all-gather of x
    backward  all-gather of dy
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        part = state_of(self, _ModuleState)
        forward = super().forward
        return part.stack.run_on_all_tokens(part.name, part.argument, forward, args, kwargs)


def shard_sequence(
    plan: Plan,
    modules: Mapping[str, nn.Module],
    *,
    group: TPGroup,
    context: ForwardContext,
    undo: list[Callable[[], None]],
) -> None:
    """Let the stacks of ``plan`` shard their tokens; ``undo`` receives what undoes each step.

    The plan's layers are sharded before.
    """
    if not plan.stacks:
        return
    run_layer = torch.compiler.disable(
        Stack.run,
        reason="tensor_parallel.sequence_parallel: dropout, whose layers are not compiled",
    )
    hidden = HiddenStates(group)
    for planned in plan.stacks:
        stack = Stack(planned.owner, group=group, context=context, hidden=hidden)
        for name in planned.layers:
            module = modules[name]
            layer = StackLayer(
                name=name,
                argument=_first_argument(module, name),
                is_first=name == planned.layers[0],
                is_last=name == planned.layers[-1],
                token_arguments=_places(module, planned.token_arguments),
                streams_first=planned.streams_first,
            )
            undo.append(set_state(module, _LayerState(stack, layer, run_layer)))
            undo.append(mix_in(SequenceParallelLayer, module))
        for names, mixin in (
            (planned.gather_input, GatherInput),
            (planned.gather_scatter, GatherInputScatterOutput),
        ):
            for name in names:
                part = _ModuleState(stack, _first_argument(modules[name], name), name)
                undo.append(set_state(modules[name], part))
                undo.append(mix_in(mixin, modules[name]))
        for name in planned.reduce_scatter_output:
            sharding = sharding_of(modules[name])
            reduce = _StackReduce(stack, name)
            undo.append(set_state(modules[name], replace(sharding, reduce=reduce)))
        undo.extend(mix_in(NormOfOwnTokens, modules[name]) for name in planned.norms)
        undo.extend(hook.remove for hook in stack.register_hooks(modules[planned.owner]))
    # A model may call the owner without some of its own arguments.
    asked = {name for planned in plan.stacks for name in _with_parents(planned.owner)}
    for name in sorted(asked & modules.keys()):
        undo.extend(hook.remove for hook in hidden.register_hooks(name, modules[name]))


def modules_behind_stacks(plan: Plan, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """What gives on hidden states that their tokens may be gathered of later: the last layers, the
    norms behind them, and what is around these, but for the model."""
    return [
        modules[name]
        for stack in plan.stacks
        if stack.norms
        for name in (stack.layers[-1], *stack.norms, *_with_parents(stack.owner))
        if name
    ]


def _with_parents(name: str) -> list[str]:
    """The names of a module and of those around it; that of the model is empty."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


class _StackReduce:
    """``LayerSharding.reduce`` of a row layer in a stack."""

    def __init__(self, stack: Stack, name: str) -> None:
        self._stack = stack
        self._name = name

    def __call__(self, y: Tensor, group: TPGroup) -> Tensor:
        return self._stack.reduce_output(y, group, self._name)


def _places(module: nn.Module, names: Collection[str]) -> dict[str, int]:
    """The places of those of ``names`` that are arguments of the module's forward."""
    parameters = inspect.signature(module.forward).parameters
    return {name: place for place, name in enumerate(parameters) if name in names}


def _first_argument(module: nn.Module, name: str) -> FirstArgument:
    """ValueError for a forward without arguments."""
    for parameter in inspect.signature(module.forward).parameters.values():
        return FirstArgument(parameter.name)
    raise ValueError(
        f"tensor_parallel.sequence_parallel is true, but the forward of {name} takes no argument "
        "whose tokens could be sharded; set it to false"
    )
