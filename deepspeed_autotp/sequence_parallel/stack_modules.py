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
from deepspeed_autotp._core import Stack as PlannedStack
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.module_state import set_state, state_of
from deepspeed_autotp.layers.class_swap import mix_in
from deepspeed_autotp.layers.forward_context import ForwardContext
from deepspeed_autotp.layers.layer_sharding import sharding_of
from deepspeed_autotp.sequence_parallel.hidden_states import HiddenStates
from deepspeed_autotp.sequence_parallel.own_tokens import NormOfOwnTokens, takes_tokens_one_by_one
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
    last = _stack_before_head(plan)
    for planned in plan.stacks:
        is_before_head = last is not None and planned.layers == last.layers
        stack = Stack(
            planned.owner,
            group=group,
            context=context,
            hidden=hidden,
            may_end_later=is_before_head,
        )
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
        if is_before_head:
            features = _features_of_head(plan, modules)
            for norm in (modules[name] for name in planned.norms):
                if takes_tokens_one_by_one(norm, features=features):
                    undo.append(mix_in(NormOfOwnTokens, norm))
        undo.extend(hook.remove for hook in stack.register_hooks(modules[planned.owner]))
    # A model may call the owner without some of its own arguments.
    asked = {name for planned in plan.stacks for name in _with_parents(planned.owner)}
    for name in sorted(asked & modules.keys()):
        undo.extend(hook.remove for hook in hidden.register_hooks(name, modules[name]))


def modules_behind_layers(plan: Plan, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """What may be given hidden states whose tokens are gathered later: the last layer before the
    output head, what comes behind it, and what is around it, but for the model."""
    stack = _stack_before_head(plan)
    if stack is None:
        return []
    names, last = list(modules), stack.layers[-1]
    behind = [name for name in names[names.index(last) :] if not name.startswith(f"{last}.")]
    return [modules[name] for name in dict.fromkeys([*behind, *_with_parents(stack.owner)]) if name]


def _stack_before_head(plan: Plan) -> PlannedStack | None:
    """The stack, with norms behind it, that has the most modules around it in common with the head
    that keeps its logits sharded, and of these the last."""
    if plan.logits_layer is None:
        return None
    around = set(_with_parents(plan.logits_layer.module))
    stacks = [stack for stack in plan.stacks if stack.norms]
    common = [len(around.intersection(_with_parents(stack.owner))) for stack in stacks]
    found = [stack for stack, count in zip(stacks, common, strict=True) if count == max(common)]
    return found[-1] if found else None


def _features_of_head(plan: Plan, modules: Mapping[str, nn.Module]) -> int:
    """Of its input; 0 for a head that is no linear."""
    head = None if plan.logits_layer is None else modules[plan.logits_layer.module]
    return head.in_features if isinstance(head, nn.Linear) else 0


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
