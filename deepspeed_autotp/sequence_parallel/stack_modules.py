# SPDX-License-Identifier: Apache-2.0
"""The modules of a stack whose tokens are sharded, and how a model's modules become these."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp._core import Plan
from deepspeed_autotp.distributed.dropout_rng import DropoutRNG
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.layers.class_swap import mixed_class
from deepspeed_autotp.layers.grad_overlap import SharedInput
from deepspeed_autotp.layers.layer_sharding import LayerSharding
from deepspeed_autotp.sequence_parallel.stack import FirstArgument, Stack, StackLayer


class SequenceParallelLayer(nn.Module):
    """A layer of a stack, mixed into its class.

    x  [N, H] of the first layer, else [n, H]
    y  [N, H] of the last layer, else [n, H]

    ``run`` is ``Stack.run`` under torch.compiler.disable: the layout of the tokens is known only
    when the layer runs.
    """

    tp_stack_layer: tuple[Stack, StackLayer, Callable[..., Any]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stack, layer, run = self.tp_stack_layer
        if stack.is_idle:
            return super().forward(*args, **kwargs)
        return run(stack, layer, super().forward, args, kwargs, training=self.training)


class GatherInput(nn.Module):
    """A module that gathers all tokens at its input, mixed into its class.

    x  [n, H]; the module's own forward is given [N, H]
    """

    tp_gather_input: tuple[Stack, FirstArgument, str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stack, argument, name = self.tp_gather_input
        full = stack.gather_input(argument.of(args, kwargs), name)
        args, named = argument.replaced(args, kwargs, full)
        return super().forward(*args, **named)


class GatherInputScatterOutput(nn.Module):
    """A module that runs on all tokens, mixed into its class.

    x  [n, H]; the module's own forward is given [N, H]
    y  [n, H]; the module's own forward gives [N, H]

    forward   all-gather of x
    backward  all-gather of dy
    """

    tp_gather_scatter: tuple[Stack, FirstArgument, str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stack, argument, name = self.tp_gather_scatter
        return stack.run_on_all_tokens(name, argument, super().forward, args, kwargs)


class ModuleChanges:
    """How a conversion changes modules so that it can be undone: by class, by attribute, and by
    functions in ``undo`` for the rest."""

    def __init__(
        self,
        set_class: Callable[[nn.Module, type[nn.Module]], None],
        assign: Callable[[nn.Module, str, Any], None],
        undo: list[Callable[[], None]],
    ) -> None:
        self.set_class = set_class
        self.assign = assign
        self.undo = undo


def shard_sequence(
    plan: Plan,
    modules: Mapping[str, nn.Module],
    *,
    group: TPGroup,
    input: SharedInput,
    rng: DropoutRNG,
    changes: ModuleChanges,
) -> None:
    """Let the stacks of ``plan`` shard their tokens. The plan's layers are sharded before."""
    if not plan.stacks:
        return
    run = torch.compiler.disable(
        Stack.run, reason="tensor_parallel.sequence_parallel: layers are not compiled in training"
    )
    for planned in plan.stacks:
        stack = Stack(planned.owner, group=group, input=input, rng=rng)
        for name in planned.layers:
            layer = StackLayer(
                name=name,
                argument=_first_argument(modules[name], name),
                is_first=name == planned.layers[0],
                is_last=name == planned.layers[-1],
            )
            changes.assign(modules[name], "tp_stack_layer", (stack, layer, run))
            changes.set_class(modules[name], mixed_class(SequenceParallelLayer, modules[name]))
        for names, key, mixin in (
            (planned.gather_input, "tp_gather_input", GatherInput),
            (planned.gather_scatter, "tp_gather_scatter", GatherInputScatterOutput),
        ):
            for name in names:
                argument = _first_argument(modules[name], name)
                changes.assign(modules[name], key, (stack, argument, name))
                changes.set_class(modules[name], mixed_class(mixin, modules[name]))
        for name in planned.reduce_scatter_output:
            sharding: LayerSharding = vars(modules[name])["sharding"]
            reduce = _StackReduce(stack, name)
            changes.assign(modules[name], "sharding", dataclasses.replace(sharding, reduce=reduce))
        # A model may call the owner without some of its own arguments.
        around = [modules[name] for name in _parents(planned.owner) if name in modules]
        hooks = stack.register_hooks(modules[planned.owner], around=around)
        changes.undo.extend(hook.remove for hook in hooks)


def _parents(name: str) -> list[str]:
    """The names of the modules around this one; that of the model, which is empty, is last."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts) - 1, -1, -1)]


class _StackReduce:
    """``LayerSharding.reduce`` of a row layer in a stack."""

    def __init__(self, stack: Stack, name: str) -> None:
        self._stack = stack
        self._name = name

    def __call__(self, y: Tensor, group: TPGroup) -> Tensor:
        return self._stack.reduce_output(y, group, self._name)


def _first_argument(module: nn.Module, name: str) -> FirstArgument:
    """ValueError for a forward without arguments."""
    for parameter in inspect.signature(module.forward).parameters.values():
        return FirstArgument(parameter.name)
    raise ValueError(
        f"tensor_parallel.sequence_parallel is true, but the forward of {name} takes no argument "
        "whose tokens could be sharded; set it to false"
    )
