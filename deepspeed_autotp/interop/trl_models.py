# SPDX-License-Identifier: Apache-2.0
"""The second model of a trainer of TRL, under tensor parallelism: a reference model that follows
the trained one, and a teacher whose output head a loss multiplies by."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from deepspeed_autotp.interop.accelerate_replicas import tp_size
from deepspeed_autotp.interop.deepspeed.module import deepspeed_module
from deepspeed_autotp.interop.deepspeed.parameters import is_partitioned
from deepspeed_autotp.interop.replaced import Replaced, put_method
from deepspeed_autotp.interop.versions import required

_CALLBACKS, _DISTILLATION = "trl.trainer.callbacks", "trl.trainer.distillation_trainer"

# The full tensor of a parameter, or None for one of a model that is not sharded.
FullParameter = Callable[[Tensor], Tensor | None]


def follow_with_shards(replaced: Replaced, full_parameter: FullParameter) -> None:
    """Let TRL, where it was imported, update a reference model on all TP ranks, and give its
    distillation loss the full output head of the teacher."""
    callbacks, distillation = sys.modules.get(_CALLBACKS), sys.modules.get(_DISTILLATION)
    if callbacks is not None:
        cls = required(callbacks, "SyncRefModelCallback", project="trl", needed_for="install()")
        put_method(replaced, cls, "sync_target_model", _sync, wrap=staticmethod)
        if (cls := vars(callbacks).get("BEMACallback")) is not None:
            put_method(replaced, cls, "on_train_begin", _refuse_averages)
    if distillation is not None:

        def loss(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return _loss_of_full_head(original, full_parameter, *args, **kwargs)

        put_method(replaced, distillation, "_chunked_divergence_loss", loss)


def _refuse_averages(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if (size := tp_size()) > 1:
        raise ValueError(
            f"BEMACallback: got tensor_parallel.autotp_size {size}, expected 1: it averages and "
            "saves the parameters of a rank, which are shards; leave it out, and average the "
            "checkpoints that the Trainer saves"
        )
    return original(*args, **kwargs)


def _sync(
    original: Callable[..., None], model: nn.Module, target_model: nn.Module, alpha: float
) -> None:
    parameters = [*model.parameters(), *target_model.parameters()]
    if tp_size() == 1 or not all(map(is_partitioned, parameters)):
        original(model, target_model, alpha)
        return
    # TRL's own changes the parts of global rank 0 alone, which holds shards of one TP rank.
    with deepspeed_module().zero.GatheredParameters(parameters, modifier_rank=0):
        if dist.get_rank(parameters[0].ds_process_group) == 0:  # type: ignore[attr-defined]
            callback = sys.modules[_CALLBACKS].SyncRefModelCallback
            callback._sync_target_model(model, target_model, alpha)


def _loss_of_full_head(
    original: Callable[..., Any], full_parameter: FullParameter, *args: Any, **kwargs: Any
) -> Any:
    """The student's head is full in its forward, in which the loss is computed; the teacher's is
    not, as its forward has ended."""
    given = inspect.signature(original).bind(*args, **kwargs)
    for name in ("teacher_lm_head_weight", "teacher_lm_head_bias"):
        shard = given.arguments.get(name)
        full = full_parameter(shard) if isinstance(shard, nn.Parameter) else None
        if full is not None:
            given.arguments[name] = full
    return original(*given.args, **given.kwargs)
