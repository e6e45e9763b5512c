# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism for a training loop without DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepspeed_autotp import interop
from deepspeed_autotp.api.pipeline import shard
from deepspeed_autotp.config.merge_recorded_args import group_size
from deepspeed_autotp.config.training_config import TPTrainingConfig, get_tensor_parallel_config
from deepspeed_autotp.config.validation import wrong
from deepspeed_autotp.distributed.consensus import Agreement, world_agreement
from deepspeed_autotp.distributed.process_group import TPGroup, time_limit
from deepspeed_autotp.planning.planner import compared
from deepspeed_autotp.state.replica_check import compare_first_call


def parallelize(
    model: nn.Module,
    *,
    tp_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    mesh: Any = None,
    config: TPTrainingConfig | Mapping[str, Any] | None = None,
    example_inputs: Mapping[str, object] | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Shard ``model`` in place for a training loop without DeepSpeed, and return it.

    tp_size         ranks that share the model: blocks of consecutive ranks of the world
    tp_group        the process group itself, instead of ``tp_size``
    mesh            a DeviceMesh, of one dimension or with one named "tp", instead of both
    config          keys of DeepSpeed's ``tensor_parallel`` section, such as ``preset_model``
    example_inputs  keyword arguments of ``model`` for the trial, the same on every rank;
                    known for transformers models
    device          where the model goes, for example "cuda": from a host each rank copies what
                    it holds alone, so the whole model is never there; default: where it lies.
                    "cuda" is the GPU that torch.cuda.set_device chose, which comes before:
                    else all ranks of a host take cuda:0

    All ranks but the first of each model may have built theirs under ``torch.device("meta")``:
    the first one hands out parts of its weights, buffers and modes, and no trial is made.
    Parameters stay the objects that they are; a fused optimizer, which asks where they lie, is
    built afterwards.

    torch.distributed must be initialised. Gradients are then those of the single-device
    model; average them over the data-parallel ranks, and clip with :func:`clip_grad_norm_`.
    The ranks of a group are given the same batches, which the first call checks. Raises one
    ValueError on every rank of the group, with the model unchanged.
    """
    if not dist.is_initialized():
        raise ValueError(
            "parallelize needs torch.distributed: call torch.distributed.init_process_group and "
            "start the script with torchrun"
        )
    # Which ranks agree has to be known before they can; everything else all of them check.
    handle = tp_group if mesh is None else interop.mesh_group(mesh)
    if handle is not None:
        group_size(handle, dist, "parallelize: tp_group")
    agreement = world_agreement() if handle is None else Agreement(handle)

    def settle() -> TPTrainingConfig:
        if not isinstance(model, nn.Module):
            raise ValueError(f"parallelize: model: {wrong(model, 'a torch.nn.Module')}")
        if sum(given is not None for given in (tp_size, tp_group, mesh)) > 1:
            raise ValueError("parallelize: give one of tp_size, tp_group and mesh")
        _check_device(device)
        return _settings(config, tp_size, handle)

    settings = agreement.together(settle)
    agreement.same(compared(settings), "the configuration")
    if settings.autotp_size <= 1:
        return model if device is None else model.to(device)
    if handle is None:
        assert dist.group.WORLD is not None
        limit = time_limit(dist.group.WORLD)
        handle, _ = dist.new_subgroups(group_size=settings.autotp_size, timeout=limit)
    group = TPGroup(handle)
    shard(
        model,
        settings=settings,
        group=group,
        agreement=agreement,
        example_inputs=example_inputs,
        device=None if device is None else _numbered(device),
    )
    compare_first_call(model, group)
    return model


def _check_device(device: torch.device | str | None) -> None:
    """ValueError for a device that is not here."""
    if device is None:
        return
    reason = "it holds no values"
    try:
        if torch.empty(0, device=device).device.type != "meta":
            return
    except (TypeError, RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
    expected = "a device of this machine, such as 'cuda'"
    raise ValueError(f"parallelize: device: {wrong(device, expected)}: {reason}")


def _numbered(device: torch.device | str) -> torch.device:
    """``cuda`` as the current one of its devices, as tensors name it."""
    return torch.empty(0, device=device).device


def _settings(
    config: TPTrainingConfig | Mapping[str, Any] | None, tp_size: int | None, handle: Any
) -> TPTrainingConfig:
    """The configuration with the degree in ``autotp_size``, wherever it was given."""
    if isinstance(config, TPTrainingConfig):
        settings = config
    else:
        settings = get_tensor_parallel_config({"tensor_parallel": {} if config is None else config})
    if "dtype" in settings.model_fields_set:
        raise ValueError(
            "parallelize: config.dtype has no effect here: the model trains in the data type "
            "that it has; leave it out"
        )
    nested = settings.tensor_parallel
    if nested.tp_group is not None or nested.mpu is not None:
        raise ValueError(
            "parallelize: config names process groups in its nested section; pass tp_group to "
            "parallelize instead"
        )
    if tp_size is not None and (type(tp_size) is not int or tp_size < 1):
        raise ValueError(f"parallelize: tp_size: {wrong(tp_size, 'a number of ranks')}")
    stated: dict[str, int] = {}
    if tp_size is not None:
        stated["tp_size"] = tp_size
    if handle is not None:
        stated["the ranks of the group"] = dist.get_world_size(handle)
    if "autotp_size" in settings.model_fields_set:
        stated["config.autotp_size"] = max(settings.autotp_size, 1)
    if "tp_size" in nested.model_fields_set:
        stated["config.tp.tp_size"] = nested.tp_size
    degree = _agreed_degree(stated)
    ranks = dist.get_world_size()
    if handle is None and ranks % degree:
        raise ValueError(
            f"parallelize: the degree is {degree}, which does not divide the {ranks} ranks of "
            "this run"
        )
    return settings.model_copy(update={"autotp_size": degree})


def _agreed_degree(stated: Mapping[str, int]) -> int:
    if not stated:
        raise ValueError("parallelize: pass tp_size, tp_group or mesh: no degree is given")
    if len(set(stated.values())) > 1:
        words = ", but ".join(f"{size} in {where}" for where, size in stated.items())
        raise ValueError(f"parallelize: the degree is {words}")
    return next(iter(stated.values()))
