# SPDX-License-Identifier: Apache-2.0
"""Full weights given to modules that hold shards: loaded, or drawn anew."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deepspeed_autotp.interop.deepspeed.parameters import is_partitioned
from deepspeed_autotp.interop.torch_private import own_parameters
from deepspeed_autotp.interop.transformers import replace_method
from deepspeed_autotp.state.sharded_model import TensorParallel, owner_of, shard_of


def take_full_weights(model: nn.Module, state: TensorParallel) -> None:
    """Let the modules of ``model`` that hold shards take full weights.

    ``load_state_dict`` takes this rank's shards of full tensors. ``apply`` and ``reset_parameters``
    see full tensors, so that what they draw is what one process draws; all ranks call them.
    """
    for module in model.modules():
        own = own_parameters(module).values()
        if any(parameter is not None and state.is_sharded(parameter) for parameter in own):
            module.register_load_state_dict_pre_hook(take_shards)
            vars(module)["apply"] = types.MethodType(_apply, module)
            replace_method(module, "reset_parameters", _reset_parameters)


def take_shards(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Before a state is loaded: full tensors are replaced by this rank's shards."""
    for leaf, parameter in own_parameters(module).items():
        given = state_dict.get(prefix + leaf)
        state = None if parameter is None else owner_of(parameter)
        if parameter is None or state is None or given is None:
            continue
        entry = state.entry(parameter)
        if entry is not None and tuple(given.shape) == entry.shape != tuple(parameter.shape):
            state_dict[prefix + leaf] = shard_of(given, entry=entry, rank=state.group.rank)


def _apply(module: nn.Module, fn: Callable[[nn.Module], None]) -> nn.Module:
    for child in module.children():
        child.apply(fn)
    _with_full_weights(module, lambda: fn(module))
    return module


def _reset_parameters(module: nn.Module) -> None:
    own: Any = type(module)
    _with_full_weights(module, lambda: own.reset_parameters(module))


def _with_full_weights(module: nn.Module, change: Callable[[], None]) -> None:
    """Call ``change`` with full tensors, and keep this rank's shards of what it leaves."""
    held = []
    for parameter in own_parameters(module).values():
        state = None if parameter is None else owner_of(parameter)
        entry = None if parameter is None or state is None else state.entry(parameter)
        if (
            parameter is not None
            and state is not None
            and entry is not None
            and entry.is_sharded
            and not is_partitioned(parameter)
            and state.held(parameter) is None
        ):
            held.append((parameter, state, entry))
    with torch.no_grad():
        for parameter, state, entry in held:
            state.hold(parameter, entry=entry)
    try:
        change()
        with torch.no_grad():
            for parameter, state, entry in held:
                state.write_held(parameter, entry=entry)
    finally:
        for parameter, state, _ in held:
            state.release(parameter)
