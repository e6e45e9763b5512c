# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism for a training loop without DeepSpeed.

torch.distributed must be initialised. Gradients are then those of the single-device model; average
them over the data-parallel ranks, and clip with ``clip_grad_norm_``. The ranks of a TP group are
given the same batches, which the first call checks, on CPUs every call.

The self-check knows the inputs of transformers models without ``example_inputs``.

All ranks but TP rank 0 may have built their model under ``torch.device("meta")``: rank 0 scatters
its weights, buffers and modes; the self-check then needs a twin of the model. Parameters stay the
objects that they are; a fused optimizer, which asks which device they are on, is built afterwards.

``device`` is for example "cuda": from the CPU each rank copies what it holds alone, so that the
full model is never there. "cuda" is the GPU that torch.cuda.set_device chose, which comes before:
else all ranks of a machine take cuda:0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepspeed_autotp.api.pipeline import described, settled, shard
from deepspeed_autotp.api.tp_arguments import TPArguments
from deepspeed_autotp.checkpoint.distributed_state import refuse_own_state
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.config.validation import wrong
from deepspeed_autotp.distributed.consensus import Agreement, world_agreement
from deepspeed_autotp.distributed.model_groups import group_timeout
from deepspeed_autotp.distributed.owned_groups import OwnedGroups
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.loading.file_weights import FileWeights
from deepspeed_autotp.planning.agreed_plans import compared
from deepspeed_autotp.planning.model_description import Description
from deepspeed_autotp.sharding.weight_location import refuse_unlike
from deepspeed_autotp.state.mesh_check import check_spreading
from deepspeed_autotp.state.optimizer_check import check_optimizers
from deepspeed_autotp.state.replica_check import check_calls
from deepspeed_autotp.state.replica_drift import compare_replicas

# The configuration, what of it is the same on all ranks, and the model where there is one to shard.
Settled = tuple[TPTrainingConfig, Mapping[str, str], Description | None]


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

    tp_size         ranks in a TP group: consecutive ranks of the world
    tp_group        the process group itself, instead of ``tp_size``
    mesh            a DeviceMesh, of one dimension or with one named "tp", instead of both
    config          keys of DeepSpeed's ``tensor_parallel`` section, such as ``preset_model``
    example_inputs  keyword arguments of ``model`` for the self-check, alike on every rank
    device          where the shards go; default: where the weights are

    Raises one ValueError on every rank, with the model unchanged. What the loop has to do is in
    the docstring of the module, deepspeed_autotp.api.torch_loop.
    """
    arguments = TPArguments(
        called="parallelize",
        group_key="tp_group",
        tp_size=tp_size,
        group=tp_group,
        mesh=mesh,
        config=config,
        device=device,
    )
    given = arguments.given_group()

    def settle() -> Settled:
        _check_model(model)
        arguments.check()
        settings = arguments.settings(given)
        description = described(model) if settings.autotp_size > 1 else None
        return settings, compared(settings), description

    group = sharded_over(given, settle, example_inputs=example_inputs, device=device)
    if group is None:
        return model if device is None else model.to(device)
    return model


def sharded_over(
    given: dist.ProcessGroup | None,
    settle: Callable[[], Settled],
    *,
    example_inputs: Mapping[str, object] | None,
    device: torch.device | str | None,
    weights: Callable[[], FileWeights | None] = lambda: None,
    large_names: tuple[str, ...] | None = None,
) -> TPGroup | None:
    """Shard what ``settle`` describes, and return over which group; None where there is nothing
    to shard. ``weights()`` is asked then. What was made is closed where any rank fails.
    ``large_names`` as in a PlanRequest, for a model that stands for a larger one."""
    with ExitStack() as on_failure, closing(OwnedGroups()) as for_this_call:
        group = None if given is None else _closed_by(on_failure, TPGroup(given))
        # Which ranks agree has to be known before they can; everything else all of them check.
        agreement = world_agreement(for_this_call) if group is None else Agreement(group.cpu_handle)
        settings, description, reports = settled(agreement, settle)
        if description is None:
            return None
        from_files = weights()
        if from_files is None:
            refuse_unlike(reports, settings.autotp_size)
        if group is None:
            group = _closed_by(on_failure, _new_group(settings.autotp_size))
        state = shard(
            description,
            settings=settings,
            group=group,
            agreement=agreement,
            reports=reports,
            example_inputs=example_inputs,
            device=_numbered(device),
            weights=from_files,
            large_names=large_names,
        )
        check_optimizers(state)
        check_calls(state)
        compare_replicas(state)
        check_spreading(state)
        refuse_own_state(state)
        on_failure.pop_all()
    return group


def _closed_by(stack: ExitStack, group: TPGroup) -> TPGroup:
    stack.callback(group.close)
    return group


def _new_group(tp_size: int) -> TPGroup:
    """The group of consecutive ranks that this rank belongs to."""
    assert dist.group.WORLD is not None
    owned = OwnedGroups()
    handle, _ = dist.new_subgroups(group_size=tp_size, timeout=group_timeout(dist.group.WORLD))
    return TPGroup(owned.adopt(handle), owned)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"parallelize: model: {wrong(model, 'a torch.nn.Module')}")


def _numbered(device: torch.device | str | None) -> torch.device | None:
    """``cuda`` as the current one of its devices, as tensors name it."""
    return None if device is None else torch.empty(0, device=device).device
