# SPDX-License-Identifier: Apache-2.0
"""What users do to the weights of a module that is sharded: load full ones, or draw new ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deepspeed_autotp.distributed.rng_observation import Observation, default_generator
from deepspeed_autotp.interop.module_state import replace_method
from deepspeed_autotp.interop.torch_private import own_parameters
from deepspeed_autotp.state.sharded_model import TensorParallel, owner_of, shard_of

_DRAWN = (
    "would draw the same values for the shards of all ranks; draw weights before the model is "
    "sharded, or within deepspeed_autotp.gather_params(module, modifier_rank=0)"
)


def take_full_weights(model: nn.Module, state: TensorParallel) -> list[Callable[[], None]]:
    """Let the modules of ``model`` that hold shards load full weights, and refuse to draw new ones;
    what undoes it, step by step.

    ``load_state_dict`` takes this rank's shards of full tensors. ``reset_parameters``, and a
    function given to ``apply`` that draws random numbers for such a module, are a RuntimeError.
    """
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        own = own_parameters(module).values()
        is_sharded = any(p is not None and state.is_sharded(p) for p in own)
        if is_sharded and "apply" not in vars(module):
            undo.append(module.register_load_state_dict_pre_hook(_take_shards).remove)
            undo.append(replace_method(module, "apply", _apply))
            undo.append(replace_method(module, "reset_parameters", _reset_parameters))
    return undo


def _take_shards(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Before a state is loaded: full tensors are replaced by this rank's shards."""
    for leaf, parameter in own_parameters(module).items():
        given = state_dict.get(prefix + leaf)
        state = None if parameter is None else owner_of(parameter)
        if parameter is None or state is None or not isinstance(given, Tensor):
            continue
        entry = state.entry(parameter)
        if entry is not None and tuple(given.shape) == entry.shape != tuple(parameter.shape):
            state_dict[prefix + leaf] = shard_of(given, entry=entry, rank=state.group.rank)


def _apply(module: nn.Module, fn: Callable[[nn.Module], None]) -> nn.Module:
    for child in module.children():
        child.apply(fn)
    device = next(p.device for p in own_parameters(module).values() if p is not None)
    observed = Observation(default_generator(device))
    fn(module)
    observed.look()
    if observed.has_drawn and not _is_gathered(module):
        raise RuntimeError(f"apply: {type(module).__name__} is sharded, and this function {_DRAWN}")
    return module


def _reset_parameters(module: nn.Module) -> None:
    if not _is_gathered(module):
        raise RuntimeError(f"{type(module).__name__} is sharded, and reset_parameters {_DRAWN}")
    own: Any = type(module)
    own.reset_parameters(module)


def _is_gathered(module: nn.Module) -> bool:
    """Whether the parameters of ``module`` are full for now."""
    own = [p for p in own_parameters(module).values() if p is not None]
    states = [owner_of(parameter) for parameter in own]
    return any(s is not None and s.held(p) is not None for p, s in zip(own, states, strict=True))
