# SPDX-License-Identifier: Apache-2.0
"""What of an engine's configuration, groups and optimizer is checked, here and among the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from deepspeed_autotp.config.tp_size import check_engine_tp_size, consecutive_ranks
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.interop.deepspeed.engine import has_stepped, optimizer_type
from deepspeed_autotp.interop.deepspeed.groups import engine_group_size
from deepspeed_autotp.interop.optimizer_parts import refuse_unlike_on_parts
from deepspeed_autotp.interop.optimizers import refuse_optimizer_over_tensors
from deepspeed_autotp.interop.process_groups import mpu_group
from deepspeed_autotp.planning.agreed_plans import compared
from deepspeed_autotp.state.sharded_model import TensorParallel, find_tensor_parallel

# What DeepSpeed's own steps depend on: with other values on another rank they wait for ever.
_COMPARED = (
    "bf16",
    "bfloat16",
    "fp16",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "expert_parallel",
)

# What decides on the plan of a model.
_OF_PLAN = (
    "tensor_parallel.preset_model",
    "tensor_parallel.partition_config",
    "tensor_parallel.vocab_parallel_lm_head",
    "tensor_parallel.sequence_parallel",
    "tensor_parallel.expert_partition",
    "tensor_parallel.tp_grain_size",
)


def compared_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """What has to be the same on every rank."""
    values = {key: str(config[key]) for key in _COMPARED if key in config}
    zero = config["zero_optimization"]
    values["zero_optimization.stage"] = str(zero.get("stage") if isinstance(zero, dict) else zero)
    return values


def check_tp_size(model: nn.Module, settings: TPTrainingConfig, *, has_mpu: bool) -> None:
    """ValueError unless the TP size fits the ranks, and what is sharded already."""
    before = find_tensor_parallel(model)
    check_engine_tp_size(
        settings,
        rank=dist.get_rank(),
        ranks=dist.get_world_size(),
        sharded_over=None if before is None else before.group.global_ranks,
        engine_ranks=engine_group_size(),
        has_mpu=has_mpu,
    )
    if before is not None:
        _check_rules(settings, before)


def _check_rules(settings: TPTrainingConfig, before: TensorParallel) -> None:
    """ValueError where a key that is written asks for another plan than a model has already."""
    if settings.sequence_parallel and not before.plan.stacks:
        raise ValueError(
            "tensor_parallel.sequence_parallel is true, but the model was sharded without it; set "
            "it where the model is sharded, in parallelize or from_pretrained"
        )
    written = {f"tensor_parallel.{key}" for key in settings.model_fields_set}
    if "tp_grain_size" in settings.tensor_parallel.model_fields_set:
        written.add("tensor_parallel.tp_grain_size")
    now = compared(settings)
    for key in _OF_PLAN:
        if key in written and now[key] != before.settings[key]:
            raise ValueError(
                f"{key} is {now[key]}, but the model was sharded with {before.settings[key]}; set "
                "it where the model is sharded, in parallelize or from_pretrained, or leave it out"
            )


def check_groups(settings: TPTrainingConfig, mpu: Any) -> None:
    """ValueError for other ranks than consecutive ones, which DeepSpeed's engine uses always."""
    nested = settings.tensor_parallel
    expected = consecutive_ranks(settings.autotp_size, dist.get_rank())
    for group, what in (
        (nested.tp_group, "tensor_parallel.tp.tp_group"),
        (mpu_group(nested.mpu), "tensor_parallel.tp.mpu"),
        (mpu_group(mpu), "mpu"),
    ):
        actual = expected if group is None else list(dist.get_process_group_ranks(group))
        if actual != expected:
            raise ValueError(
                f"{what}: got a group of the ranks {actual}, but DeepSpeed's engine needs "
                f"{settings.autotp_size} consecutive ranks, here {expected}; leave it out, or "
                "number the processes so that the ranks of a TP group follow one another"
            )


def check_optimizer(optimizer: Any, config: Mapping[str, Any]) -> None:
    """ValueError for an optimizer that cannot update shards."""
    if optimizer is not None:
        refuse_optimizer_over_tensors(optimizer, before="initialize: optimizer")
        refuse_unlike_on_parts(optimizer, before="initialize: optimizer")
    else:
        refuse_optimizer_over_tensors(optimizer_type(config), before="initialize: optimizer.type")
    if has_stepped(optimizer):
        raise ValueError(
            "the optimizer holds state of the full weights already, as Adagrad does from the "
            "beginning; build it anew, or load its state with engine.load_checkpoint after "
            "initialize, or give initialize a function that builds it from parameters"
        )


def check_made_optimizer(made: Any, *, given: Any) -> None:
    """The same for the optimizer of an engine, where ``given`` is a function that makes it."""
    if made is not given:
        refuse_optimizer_over_tensors(made, before="initialize: optimizer")
        refuse_unlike_on_parts(made, before="initialize: optimizer")
