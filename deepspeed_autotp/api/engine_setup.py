# SPDX-License-Identifier: Apache-2.0
"""What has to be known and done before DeepSpeed's engine is built."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from deepspeed_autotp import _core, interop
from deepspeed_autotp.api.pipeline import shard
from deepspeed_autotp.checkpoint.full_state import first_rank_state_dict
from deepspeed_autotp.checkpoint.metadata import check_note, write_note
from deepspeed_autotp.config.loader import load_ds_config
from deepspeed_autotp.config.merge_recorded_args import copied, merge
from deepspeed_autotp.config.recorded_args import RECORDS
from deepspeed_autotp.config.section import is_auto
from deepspeed_autotp.config.training_config import (
    TPTrainingConfig,
    deepspeed_section,
    get_tensor_parallel_config,
)
from deepspeed_autotp.config.validation import wrong
from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.planning.planner import compared
from deepspeed_autotp.state.replica_check import compare_first_call
from deepspeed_autotp.state.tensor_parallel import find_tensor_parallel, tensor_parallel

_log = logging.getLogger("deepspeed_autotp")

# What DeepSpeed's own steps depend on: with other values on another rank they wait for ever.
_COMPARED = (
    "bf16",
    "bfloat16",
    "fp16",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """``settings`` is None where there is nothing to shard; ``config`` is DeepSpeed's.

    ``compared`` has to be the same on every rank.
    """

    config: dict[str, Any]
    settings: TPTrainingConfig | None
    compared: Mapping[str, str]


def prepare(
    model: object, given: Any, *, mpu: Any, mesh_param: Any, optimizer: Any, warn: bool
) -> Prepared:
    """Read, merge and check everything that does not need the model's weights.

    ``warn`` is whether this rank speaks for all. ValueError for whatever cannot be right;
    nothing has changed then.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"initialize: model: {wrong(model, 'a torch.nn.Module')}")
    interop.refuse_engine_record()
    config = copied(load_ds_config(given))
    get_tensor_parallel_config(config)  # wrong types of the whole section come in one error
    recorded = RECORDS.of(model)
    if recorded is None and RECORDS.any_alive() and warn:
        _log.warning(
            "tp_model_init recorded arguments for another model; they do not hold for this %s",
            type(model).__name__,
        )
    merge(config, recorded, mpu=mpu, mesh_param=mesh_param, dist_module=dist)
    _check_asked(config)
    settings = get_tensor_parallel_config(config)
    if "tensor_parallel" in config:
        config["tensor_parallel"] = section = deepspeed_section(settings)
        # DeepSpeed makes the groups itself, and prints its configuration as JSON.
        section["tp"] = {"tp_size": section["tp"]["tp_size"]}
    _check_degree(model, settings)
    _check_groups_made(settings.autotp_size, mpu)
    if settings.autotp_size <= 1:
        return Prepared(config, None, {"tensor_parallel.autotp_size": "0 or 1"})
    interop.refuse_pipeline(model)
    _check_groups(settings, mpu)
    _check_optimizer(optimizer)
    interop.default_whole_weights_on_save(config)
    interop.settle_engine_config(config, mpu=mpu)
    values = {key: str(config[key]) for key in _COMPARED if key in config}
    zero = config["zero_optimization"]
    values["zero_optimization.stage"] = str(zero.get("stage") if isinstance(zero, dict) else zero)
    values["the model"] = "whole" if find_tensor_parallel(model) is None else "sharded"
    return Prepared(config, settings, compared(settings) | values)


def shard_for_engine(model: nn.Module, *, settings: TPTrainingConfig, agreement: Agreement) -> None:
    """Shard ``model`` over the engine's group, unless it is, and tell DeepSpeed so."""
    handle = interop.engine_group(tp_size=settings.autotp_size)
    state = find_tensor_parallel(model)
    if state is None:
        state = shard(model, settings=settings, group=TPGroup(handle), agreement=agreement)
    interop.mark_parameters(state.parameters, keeper=state, counted=state.counts_in_norm)
    interop.mark_model(model)


def finish(engine: Any, model: nn.Module, *, agreement: Agreement) -> None:
    """What an engine around a sharded ``model`` does otherwise than DeepSpeed's own.

    ``agreement`` spans all ranks of the run; it serves every checkpoint.
    """
    interop.save_whole_weights(
        engine, whole=lambda frozen: first_rank_state_dict(model, frozen=frozen)
    )
    state = tensor_parallel(model)

    def saving(folder: Path | None) -> None:
        if folder is not None:
            write_note(folder, state.plan)

    interop.watch_checkpoints(
        engine,
        saving=lambda folder: agreement.together(lambda: saving(folder)),
        loading=lambda folder: agreement.together(
            lambda: check_note(folder, state.plan, rank=state.group.rank)
        ),
    )
    # DeepSpeed compares, too, but lets the group's first rank go on and wait for the others.
    compare_first_call(model, state.group)


def _check_asked(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that asks for tensor parallelism in a way that goes unheard."""
    section = config.get("tensor_parallel")
    if section is not None and is_auto(section.get("autotp_size")):
        raise ValueError(
            "tensor_parallel.autotp_size: 'auto' has nothing to be taken from: tp_model_init "
            "recorded no degree for this model; write the number of ranks, or 1 to leave it whole"
        )
    if section is None and (misspelt := [key for key in config if _is_nearly_ours(key)]):
        raise ValueError(
            f"the configuration: {misspelt[0]!r} is no section; write 'tensor_parallel'"
        )


def _is_nearly_ours(key: object) -> bool:
    """Whether a key is ``tensor_parallel`` with a slip; a part of it, as ``tensor``, is none."""
    ours = "tensor_parallel"
    near = isinstance(key, str) and _core.nearest(key, [ours])
    return bool(near) and abs(len(str(key)) - len(ours)) <= len(ours) // 3


def _check_degree(model: nn.Module, settings: TPTrainingConfig) -> None:
    degree, ranks = settings.autotp_size, dist.get_world_size()
    nested = settings.tensor_parallel.tp_size
    if degree == 0 and nested > 1:
        raise ValueError(
            f"tensor_parallel.tp.tp_size is {nested}, but autotp_size, which switches tensor "
            f"parallelism on, is not set; write autotp_size: {nested}"
        )
    before = find_tensor_parallel(model)
    if before is not None and settings.sequence_parallel and not before.plan.stacks:
        raise ValueError(
            "tensor_parallel.sequence_parallel is true, but the model was sharded without it; set "
            "it where the model is sharded, in parallelize"
        )
    if before is not None and list(before.group.global_ranks) != _consecutive(degree):
        raise ValueError(
            f"the model is sharded over the ranks {list(before.group.global_ranks)} already, but "
            f"with tensor_parallel.autotp_size {degree} DeepSpeed uses {_consecutive(degree)}"
        )
    if degree > 1 and ranks % degree:
        fitting = [n for n in range(1, ranks + 1) if ranks % n == 0]
        raise ValueError(
            f"tensor_parallel.autotp_size is {degree}, which does not divide the {ranks} ranks of "
            f"this run; sizes that fit: {', '.join(map(str, fitting))}"
        )


def _check_groups_made(degree: int, mpu: Any) -> None:
    """DeepSpeed keeps one set of groups for the whole process and uses it for every engine."""
    made = interop.engine_group_size()
    if made is None or made == max(degree, 1) or (degree <= 1 and mpu is not None):
        return
    raise ValueError(
        f"tensor_parallel.autotp_size is {degree}, but DeepSpeed has groups of {made} ranks in "
        "this process already, from an earlier engine, and can have one size only. Use "
        f"autotp_size {made} for this model, too, or initialize it in another process"
        + (", or before the sharded one." if degree <= 1 else ".")
    )


def _consecutive(degree: int) -> list[int]:
    """The ranks that share a model with this one in DeepSpeed's engine."""
    degree = max(degree, 1)
    first = dist.get_rank() // degree * degree
    return list(range(first, first + degree))


def _check_groups(settings: TPTrainingConfig, mpu: Any) -> None:
    """DeepSpeed's engine uses consecutive ranks, whatever group it is given."""
    nested = settings.tensor_parallel
    expected = _consecutive(settings.autotp_size)
    for group, what in (
        (nested.tp_group, "the tp_group"),
        (interop.mpu_group(nested.mpu), "the group of tensor_parallel.tp.mpu"),
        (interop.mpu_group(mpu), "the group of mpu"),
    ):
        actual = expected if group is None else list(dist.get_process_group_ranks(group))
        if actual != expected:
            raise ValueError(
                f"{what} has the ranks {actual}, but DeepSpeed's engine needs "
                f"{settings.autotp_size} consecutive ranks, here {expected}. Leave the group away, "
                "or number the processes so that the ranks of a group follow one another."
            )


def _check_optimizer(optimizer: Any) -> None:
    if interop.has_stepped(optimizer):
        raise ValueError(
            "the optimizer holds state of the whole weights already; build it anew, or load its "
            "state with engine.load_checkpoint after initialize"
        )
