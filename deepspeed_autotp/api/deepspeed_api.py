# SPDX-License-Identifier: Apache-2.0
"""The calls with DeepSpeed's names and signatures.

The TP size of ``initialize`` is ``tensor_parallel.autotp_size`` of the configuration (a dictionary,
a path or base64) or what ``tp_model_init`` recorded; with 0 or 1 nothing is changed. The
configuration given is not changed. Ranks other than TP rank 0 of each group may have their model on
the meta device, as in ``parallelize``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from deepspeed_autotp.api.engine_setup import EngineSetup
from deepspeed_autotp.api.mode import set_autotp_mode
from deepspeed_autotp.config.dtypes import parse_dtype
from deepspeed_autotp.config.load_config import load_ds_config
from deepspeed_autotp.config.merge_recorded_args import compare, copied, fill_dictionary
from deepspeed_autotp.config.recorded_args import RECORDS, Recorded
from deepspeed_autotp.config.tp_size import group_ranks
from deepspeed_autotp.config.validation import shown, wrong
from deepspeed_autotp.interop.accelerate import last_data
from deepspeed_autotp.interop.deepspeed.engine import (
    config_argument,
    engine_initialize,
    without_config,
)
from deepspeed_autotp.interop.deepspeed.groups import engine_group, init_distributed
from deepspeed_autotp.planning.model_description import dtype_name
from deepspeed_autotp.self_check.inferred_inputs import TrainingData


def tp_model_init(
    model: nn.Module, tp_size: int, dtype: Any, config: Any = None, **kwargs: Any
) -> nn.Module:
    """Record tensor-parallel arguments for a later ``initialize``; returns ``model`` untouched.

    tp_size  ranks over which the model is sharded
    dtype    data type of training: a torch dtype or any usual spelling
    config   a DeepSpeed configuration to check the arguments against, at once
    tp_group (keyword) the process group; without it groups are made

    ValueError when a live record or ``config`` says otherwise, naming both values. On a rank that
    is not in ``tp_group``, ``initialize`` raises it, on all ranks.
    """
    tp_group = kwargs.pop("tp_group", None)
    if kwargs:
        raise TypeError(f"tp_model_init got unknown arguments {sorted(kwargs)}; known: tp_group")
    if not isinstance(model, nn.Module):
        raise TypeError(f"tp_model_init: model: got {shown(model)}, expected a torch.nn.Module")
    if config is not None:
        record = _record_of(tp_size, dtype, tp_group, dist)
        asked = _initialized(dist)
        if record.values[3] >= 0:  # or initialize says on all ranks that this one is not in it
            compare(load_ds_config(config), record, mpu=None, mesh_param=None, dist_module=asked)
    record_tp_model_init_args(tp_size, dtype, tp_group, dist, model=model)
    set_autotp_mode(training=True)
    return model


def record_tp_model_init_args(
    tp_size: int, dtype: Any, tp_group: Any, dist_module: Any, model: nn.Module | None = None
) -> None:
    """Record arguments; without ``model`` they hold for any model until :func:`reset`."""
    record = _record_of(tp_size, dtype, tp_group, dist_module)
    size, name, _, ranks = record.values
    RECORDS.add(model, tp_size=size, dtype=name, tp_group=tp_group, group_size=ranks)


def merge_tp_model_init_into_config(
    config_dict: dict[str, Any], mpu: Any, mesh_param: Any, dist_module: Any
) -> None:
    """Fill ``config_dict`` from the latest record that is still alive; nothing without one.

    Process groups of consecutive ranks are made when neither a group, an mpu nor a mesh is
    given and ``dist_module`` is initialised. ValueError lists every conflict, and then
    ``config_dict`` is unchanged.
    """
    if not isinstance(config_dict, dict):
        raise ValueError(f"config_dict: {wrong(config_dict, 'a dictionary')}")
    recorded = RECORDS.latest()
    if recorded is None:
        return
    asked = _initialized(dist_module)
    fill = compare(config_dict, recorded, mpu=mpu, mesh_param=mesh_param, dist_module=asked)
    if fill["make_groups"] and asked is not None:
        init_distributed(port=29500, required=None)
        engine_group(tp_size=recorded.values[0])
    filled = copied(config_dict)
    fill_dictionary(filled, fill, recorded)
    config_dict.update(filled)


def reset() -> None:
    """Forget what ``tp_model_init`` recorded."""
    RECORDS.clear()


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
    *,
    example_inputs: Mapping[str, object] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` on a model that is sharded first.

    Takes and returns what DeepSpeed does: engine, optimizer, data loader and scheduler;
    ``example_inputs``, keyword arguments of ``model`` for the self-check, is ours. Raises
    one ValueError on every rank, with the model as it was, when the configuration has conflicts,
    the TP size does not fit the ranks, the model cannot be sharded or the ranks differ.
    """
    start = engine_initialize()
    data = last_data() if training_data is None else (training_data, collate_fn)
    init_distributed(port=distributed_port, required=dist_init_required)
    with EngineSetup(
        model,
        mpu=mpu,
        mesh_param=mesh_param,
        optimizer=optimizer,
        example_inputs=example_inputs,
        data=None if data is None else TrainingData(*data),
    ) as setup:
        engine_config = setup.shard(lambda: config_argument(args, config, config_params))
        with setup.starting():
            result: tuple[Any, Any, Any, Any] = start(
                args=without_config(args),
                model=model,
                optimizer=optimizer,
                model_parameters=setup.parameters(model_parameters),
                training_data=training_data,
                lr_scheduler=lr_scheduler,
                distributed_port=distributed_port,
                mpu=mpu,
                dist_init_required=dist_init_required,
                collate_fn=collate_fn,
                config=engine_config,
                mesh_param=mesh_param,
            )
        setup.finish(result[0])
    return result


def _record_of(tp_size: Any, dtype: Any, tp_group: Any, dist_module: Any) -> Recorded:
    if type(tp_size) is not int:
        raise TypeError(f"tp_model_init: tp_size: got {shown(tp_size)}, expected an int")
    name = dtype_name(parse_dtype(dtype, "tp_model_init: dtype"))
    ranks = group_ranks(tp_group, _initialized(dist_module), "tp_model_init: tp_group")
    return Recorded((tp_size, name, 0 if tp_group is None else id(tp_group), ranks), tp_group)


def _initialized(dist_module: Any) -> Any:
    """``dist_module`` where it can be asked for sizes, else None."""
    return dist_module if dist_module is not None and dist_module.is_initialized() else None
