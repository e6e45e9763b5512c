# SPDX-License-Identifier: Apache-2.0
"""A check of the optimizers that step the shards of a model in a loop without DeepSpeed."""

from __future__ import annotations

import weakref
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from deepspeed_autotp.interop.optimizers import refuse_optimizer_over_tensors
from deepspeed_autotp.state.sharded_model import TensorParallel


class _OptimizerCheck:
    """Before each step of any optimizer: ValueError where it would update a shard by a number over
    the tensor, or over all parameters of this rank. All ranks have the same optimizer."""

    def __init__(self, state: TensorParallel) -> None:
        self._state = weakref.ref(state)

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        state = self._state()
        if state is not None and _has_shard(optimizer, state):
            refuse_optimizer_over_tensors(optimizer, before="the optimizer of a sharded model")


def _has_shard(optimizer: Optimizer, state: TensorParallel) -> bool:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    entries = (state.entry(parameter) for parameter in parameters)
    return any(entry is not None and entry.is_sharded for entry in entries)


def check_optimizers(state: TensorParallel) -> None:
    """Check every step from now on, as long as ``state`` is there."""
    handle = register_optimizer_step_pre_hook(_OptimizerCheck(state))
    weakref.finalize(state, handle.remove)
