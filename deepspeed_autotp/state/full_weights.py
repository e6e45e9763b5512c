# SPDX-License-Identifier: Apache-2.0
"""Full weights that are loaded into a sharded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deepspeed_autotp.interop.torch_private import own_parameters
from deepspeed_autotp.state.sharded_model import TensorParallel, owner_of, shard_of


def take_full_weights(model: nn.Module, state: TensorParallel) -> list[Callable[[], None]]:
    """Let ``load_state_dict`` of ``model``, and of what is in it, take this rank's shards of full
    tensors; what undoes it, step by step."""
    return [
        module.register_load_state_dict_pre_hook(_take_shards).remove
        for module in model.modules()
        if any(p is not None and state.is_sharded(p) for p in own_parameters(module).values())
    ]


def _take_shards(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    for leaf, parameter in own_parameters(module).items():
        given = state_dict.get(prefix + leaf)
        state = None if parameter is None else owner_of(parameter)
        if parameter is None or state is None or not isinstance(given, Tensor):
            continue
        entry = state.entry(parameter)
        if entry is not None and tuple(given.shape) == entry.shape != tuple(parameter.shape):
            state_dict[prefix + leaf] = shard_of(given, entry=entry, rank=state.group.rank)
