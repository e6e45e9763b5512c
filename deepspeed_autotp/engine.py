# SPDX-License-Identifier: Apache-2.0
"""What has to be known before DeepSpeed's engine is built: settings, and what DeepSpeed gets."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from deepspeed_autotp import interop
from deepspeed_autotp.checks import shown
from deepspeed_autotp.config import (
    TPTrainingConfig,
    deepspeed_section,
    get_tensor_parallel_config,
)
from deepspeed_autotp.load import load_ds_config
from deepspeed_autotp.merging import copied, merge
from deepspeed_autotp.records import RECORDS
from deepspeed_autotp.sharded import find_tensor_parallel

_log = logging.getLogger("deepspeed_autotp")


@dataclass(frozen=True, slots=True)
class Prepared:
    """``settings`` is None where there is nothing to shard; ``config`` is DeepSpeed's."""

    config: dict[str, Any]
    settings: TPTrainingConfig | None
    sharded_before: bool = False


def prepare(
    model: nn.Module | None, given: Any, *, mpu: Any, mesh_param: Any, optimizer: Any
) -> Prepared:
    """Read, merge and check everything that does not need the model's weights.

    ValueError for whatever cannot be right; nothing has changed then.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"initialize: model: got {shown(model)}, expected a torch.nn.Module")
    config = copied(load_ds_config(given))
    recorded = RECORDS.of(model)
    if recorded is None and len(RECORDS):
        _log.warning(
            "tp_model_init recorded arguments for another model; they do not hold for this %s",
            type(model).__name__,
        )
    merge(config, recorded, mpu=mpu, mesh_param=mesh_param, dist_module=dist)
    settings = get_tensor_parallel_config(config)
    if "tensor_parallel" in config:
        config["tensor_parallel"] = deepspeed_section(settings)
    if settings.autotp_size <= 1:
        return Prepared(config, None)
    _check_ranks(settings)
    _check_group(settings.tensor_parallel.tp_group, settings.autotp_size, "the tp_group")
    if mpu is not None:
        _check_group(interop.mpu_group(mpu), settings.autotp_size, "the group of mpu")
    interop.refuse_pipeline(model)
    _check_optimizer(optimizer)
    interop.default_whole_weights_on_save(config)
    interop.settle_engine_config(config, mpu=mpu)
    before = find_tensor_parallel(model)
    if before is not None and before.group.size != settings.autotp_size:
        raise ValueError(
            f"the model is sharded over {before.group.size} ranks already, but "
            f"tensor_parallel.autotp_size is {settings.autotp_size}"
        )
    return Prepared(config, settings, sharded_before=before is not None)


def _check_ranks(settings: TPTrainingConfig) -> None:
    ranks, degree = dist.get_world_size(), settings.autotp_size
    if ranks % degree:
        fitting = [n for n in range(2, ranks + 1) if ranks % n == 0]
        raise ValueError(
            f"tensor_parallel.autotp_size is {degree}, which does not divide the {ranks} ranks of "
            f"this run; sizes that fit: {', '.join(map(str, fitting)) or 'none'}"
        )


def _check_group(group: Any, degree: int, what: str) -> None:
    """DeepSpeed's engine uses consecutive ranks, whatever group it is given."""
    if group is None:
        return
    first = dist.get_rank() // degree * degree
    expected = list(range(first, first + degree))
    actual = list(dist.get_process_group_ranks(group))
    if actual != expected:
        raise ValueError(
            f"{what} has the ranks {actual}, but DeepSpeed's engine needs {degree} consecutive "
            f"ranks, here {expected}. Leave the group away, or number the processes so that the "
            "ranks of a group follow one another."
        )


def _check_optimizer(optimizer: Any) -> None:
    if interop.has_stepped(optimizer):
        raise ValueError(
            "the optimizer holds state of the whole weights already; build it anew, or load its "
            "state with engine.load_checkpoint after initialize"
        )
