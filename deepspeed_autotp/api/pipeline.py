# SPDX-License-Identifier: Apache-2.0
"""Plan, agree, self-check, commit: how an unsharded model becomes a sharded one.

Until the commit nothing about the model has changed, and every failure is one error on every
rank. In the commit nothing can fail but the scatter of weights that only TP rank 0 has, after which
no rank has a model.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from deepspeed_autotp._core import Plan
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.distributed import nccl, shared_memory
from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.distributed.failure_barrier import PeerFailed
from deepspeed_autotp.distributed.process_group import TPGroup, cpu_group
from deepspeed_autotp.interop.deepspeed.parameters import remove_zero_partitioning
from deepspeed_autotp.interop.transformers import config_values, guard_save_pretrained
from deepspeed_autotp.native import operators
from deepspeed_autotp.planning.model_description import Description, describe
from deepspeed_autotp.planning.planner import AgreedPlans
from deepspeed_autotp.self_check.inferred_inputs import TrainingData
from deepspeed_autotp.self_check.inputs import Inputs, agreed_inputs
from deepspeed_autotp.self_check.self_check import SelfCheck
from deepspeed_autotp.sharding.conversion import Conversion
from deepspeed_autotp.sharding.scatter_from_rank0 import ScatterFromRank0
from deepspeed_autotp.sharding.weight_location import (
    WeightLocation,
    locate_weights,
    refuse_partly_there,
)
from deepspeed_autotp.sharding.weight_sync import broadcast_weights
from deepspeed_autotp.state.replica_check import broadcast_rng_state
from deepspeed_autotp.state.sharded_model import TensorParallel, attach, find_tensor_parallel

_log = logging.getLogger("deepspeed_autotp")


def shard(
    model: nn.Module,
    *,
    settings: TPTrainingConfig,
    group: TPGroup,
    agreement: Agreement,
    example_inputs: Mapping[str, object] | None = None,
    data: TrainingData | None = None,
    device: torch.device | None = None,
) -> TensorParallel:
    """Shard ``model`` over ``group``, keeping every Parameter object.

    Shards go to ``device``, or where the weights are. ``agreement`` spans all ranks: ValueError on
    all, with the model unchanged, where one cannot plan, plans differently, or a check differs.
    """
    description = agreement.together(lambda: _described(model))
    location = locate_weights(description, group, agreement)
    inputs = agreed_inputs(
        model, description, settings, example_inputs, agreement, location=location, data=data
    )
    is_checked = inputs is not None
    plans = AgreedPlans(description, settings, group.size, agreement, is_checked=is_checked)
    plan = _first_plan(plans, settings)
    _compare_rest(model, agreement)
    _warn(agreement, plan.messages)
    remove_zero_partitioning(description.parameters)
    nearby = _nearby(group, location.device)
    _share_memory((nearby, location.device), (group, device or location.device))
    make = _conversion_maker(location, nearby, device)
    with ExitStack() as on_failure:
        if not location.only_on_rank0:
            on_failure.callback(
                broadcast_weights(description, nearby, agreement=agreement, keep=is_checked)
            )
        if inputs is not None:
            check = SelfCheck(
                model,
                description,
                plan,
                group=nearby,
                overlap=settings.overlaps,
                agreement=agreement,
            )
            plan = _checked(check, inputs, plans, settings)
        elif settings.sequence_parallel:
            plan = plans.with_sequence_parallel()
        conversion = make(description, plan=plan, group=group, overlap=settings.overlaps)
        insist = settings.vocab_parallel_lm_head is True
        _switch(conversion, agreement=agreement, device=device, insist=insist)
        if warning := plan.replicated_warning():
            _warn(agreement, [f"{type(model).__name__}: {warning}"])
        on_failure.pop_all()
    _commit(conversion, agreement, device)
    return _attached(description, plan, group=group, nearby=nearby)


def _warn(agreement: Agreement, warnings: Sequence[str]) -> None:
    if agreement.is_first:
        for warning in warnings:
            _log.warning("%s", warning)


def _conversion_maker(
    location: WeightLocation, nearby: TPGroup, device: torch.device | None
) -> Callable[..., Conversion]:
    if location.only_on_rank0:
        return functools.partial(ScatterFromRank0, nearby=nearby, device=device or location.device)
    return Conversion


def _first_plan(plans: AgreedPlans, settings: TPTrainingConfig) -> Plan:
    plan = plans.make()
    if settings.sequence_parallel:
        plans.with_sequence_parallel()  # refused before the self-check where it cannot be
    return plan


def _compare_rest(model: nn.Module, agreement: Agreement) -> None:
    """ValueError where the ranks' models differ in what no plan tells."""
    buffers = {name: f"{list(b.shape)} {b.dtype}" for name, b in model.named_buffers()}
    agreement.same(buffers, "the model's buffers")
    modules = {
        name or "the model": f"{type(module).__name__}({module.extra_repr()})"
        for name, module in model.named_modules()
    }
    agreement.same(modules, "what the model is made of")
    agreement.same(config_values(model), "the model's configuration")


def _checked(
    check: SelfCheck, inputs: Inputs, plans: AgreedPlans, settings: TPTrainingConfig
) -> Plan:
    """The plan that the self-check found to be right."""
    plan = check.run(
        inputs,
        replan=plans.make,
        rules_are_users=plans.rules_are_users,
        keep_logits=settings.vocab_parallel_lm_head is True,
    )
    if settings.sequence_parallel:
        plan = check.check_sequence_parallel(plans.with_sequence_parallel())
    return plan


def _described(model: nn.Module) -> Description:
    operators.loaded()  # or an error here, on every rank
    shared_memory.check_environment()
    nccl.check_environment()
    _refuse(model)
    return describe(model)


def _switch(
    conversion: Conversion, *, agreement: Agreement, device: torch.device | None, insist: bool
) -> None:
    """Do everything of the conversion but shard the weights; undone where any rank fails.

    ``insist``: it is an error where the logits cannot stay sharded.
    """

    def finish() -> None:
        conversion.keep_logits(insist=insist)
        conversion.check_memory(device)

    try:
        agreement.together(conversion.switch)
        agreement.together(finish)
    except Exception:
        conversion.undo()
        raise


@torch.no_grad()
def _commit(conversion: Conversion, agreement: Agreement, device: torch.device | None) -> None:
    if not isinstance(conversion, ScatterFromRank0):
        conversion.commit(device)
        return

    def scatter() -> None:
        try:
            conversion.commit(device)
        except PeerFailed:  # whose own error says why
            pass
        except Exception as error:
            raise RuntimeError(
                f"scattering the weights failed, and no rank has a model now: {error}"
            ) from error

    agreement.together(scatter)


def _attached(
    description: Description, plan: Plan, *, group: TPGroup, nearby: TPGroup
) -> TensorParallel:
    place = description.parameters[0].device
    broadcast_rng_state(nearby, device=group.device if place.type == "cpu" else place)
    state = TensorParallel(plan=plan, group=group, parameters=description.parameters)
    attach(description.modules[""], state)
    guard_save_pretrained(description.modules[""])
    return state


def _refuse(model: nn.Module) -> None:
    """ValueError for a model whose weights are not there, are sharded or on several devices."""
    what = type(model).__name__
    if "_orig_mod" in model._modules:
        raise ValueError("the model is compiled already; shard it first, then call torch.compile")
    if any(find_tensor_parallel(module) is not None for module in model.modules()):
        raise ValueError(f"{what} is sharded already; shard a model once")
    places: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if _is_dtensor(tensor):
            raise ValueError(
                f"{name} is a DTensor, which is sharded already; load the model without a "
                "tp_plan or device mesh"
            )
        if not isinstance(tensor, nn.Parameter):
            continue
        places.setdefault(tensor.device, name)
        if tensor.grad is not None:
            raise ValueError(
                f"{name} has a gradient of the unsharded weight; call model.zero_grad() before"
            )
    refuse_partly_there(model)
    if not places:
        raise ValueError(f"{what} has no parameters: there is nothing to shard")
    if len(places) > 1:
        named = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise ValueError(f"the weights are on several devices ({named}); move the model to one")


def _is_dtensor(tensor: Tensor) -> bool:
    """Whether torch's own sharding, as behind transformers' ``tp_plan="auto"``, holds it."""
    # Without the module there is none, and importing it to ask would cost a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _share_memory(*groups: tuple[TPGroup, torch.device]) -> None:
    """Let groups that move tensors on the CPU do so through memory that they share."""
    for group, place in groups:
        if place.type == "cpu":
            group.share_memory()


def _nearby(group: TPGroup, place: torch.device) -> TPGroup:
    """A group over the same ranks that can move tensors that are on ``place``."""
    if place.type == "cpu" and group.device.type != "cpu":
        return TPGroup(cpu_group(group.global_ranks))
    return group
