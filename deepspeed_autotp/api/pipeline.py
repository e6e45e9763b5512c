# SPDX-License-Identifier: Apache-2.0
"""Plan, agree, self-check, commit: how an unsharded model becomes a sharded one.

Until the commit nothing about the model has changed, and every failure is one error on every
rank. In the commit nothing can fail but the scatter of weights that only TP rank 0 has, after which
no rank has a model.

The ranks of a TP group agree among themselves. All ranks of the run exchange what they have come to
at the start, once there is a plan, before the commit, and after a scatter: the more ranks there are
the longer that takes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from deepspeed_autotp._core import Plan
from deepspeed_autotp.api.adapters import AdapterChanges
from deepspeed_autotp.api.checked_plan import CheckedPlan, plan_to_check
from deepspeed_autotp.api.sharding_report import Stopwatch, log_report
from deepspeed_autotp.api.unshardable import refuse_unshardable
from deepspeed_autotp.config import logs
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.distributed import nccl, shared_memory
from deepspeed_autotp.distributed.comparison import Compared, Values
from deepspeed_autotp.distributed.consensus import Agreement, Outcome
from deepspeed_autotp.distributed.failure_barrier import PeerFailed
from deepspeed_autotp.distributed.owned_groups import close_dropped, groups_in_use
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.attention_maps import refuse_local_maps
from deepspeed_autotp.interop.deepspeed.parameters import remove_zero_partitioning
from deepspeed_autotp.interop.quantizers import refuse_dequantize
from deepspeed_autotp.interop.torch_private import output_hooks
from deepspeed_autotp.interop.transformers import config_values, guard_save_pretrained
from deepspeed_autotp.loading.file_weights import FileWeights
from deepspeed_autotp.loading.load_shards import LoadShards
from deepspeed_autotp.native import operators
from deepspeed_autotp.planning.agreed_plans import compared
from deepspeed_autotp.planning.model_description import Description, describe
from deepspeed_autotp.planning.plan_recipe import recipe
from deepspeed_autotp.planning.planner import PlanRequest
from deepspeed_autotp.self_check.inferred_inputs import TrainingData
from deepspeed_autotp.sharding.conversion import Conversion
from deepspeed_autotp.sharding.host_span import spanning_warning
from deepspeed_autotp.sharding.scatter_from_rank0 import ScatterFromRank0
from deepspeed_autotp.sharding.weight_location import (
    RankReport,
    WeightLocation,
    locate_weights,
    report,
)
from deepspeed_autotp.sharding.weight_sync import broadcast_tensors, broadcast_weights
from deepspeed_autotp.state.parameter_count import count_full_parameters
from deepspeed_autotp.state.replica_check import broadcast_rng_state
from deepspeed_autotp.state.sharded_model import TensorParallel, attach, sharded_4bit

T = TypeVar("T")
Planned = tuple[Plan, PlanRequest]

_log = logging.getLogger("deepspeed_autotp")


@dataclass(frozen=True, slots=True)
class _Task:
    """One model to be sharded over one group. Shards go to ``device``, or where the weights are.

    ``weights`` says what is read from files, of a model without values; ``large_names`` is as in a
    PlanRequest, for a model that stands for a larger one."""

    description: Description
    settings: TPTrainingConfig
    group: TPGroup
    location: WeightLocation
    device: torch.device | None
    weights: FileWeights | None
    large_names: tuple[str, ...] | None

    @property
    def model(self) -> nn.Module:
        return self.description.modules[""]

    @property
    def insists_on_sharded_logits(self) -> bool:
        """Whether it is an error where the logits cannot stay sharded."""
        return self.settings.vocab_parallel_lm_head is True


def described(model: nn.Module) -> Description:
    """What a model is; ValueError where it cannot be sharded, whatever the configuration."""
    operators.loaded()  # or an error here, on every rank
    shared_memory.check_environment()
    nccl.check_environment()
    logs.check_environment()
    refuse_unshardable(model)
    return describe(model)


def settled(
    agreement: Agreement, work: Callable[[], tuple[T, Mapping[str, str], Description | None]]
) -> tuple[T, Description | None, list[RankReport]]:
    """The first exchange of all ranks: what ``work`` has settled, the model as it described it, and
    what each rank has of it. ``work`` also gives what has to be the same of the configuration.

    ValueError on every rank where one fails or has another configuration. Groups of models that are
    gone are closed.
    """

    def outcome() -> Outcome[tuple[T, Description | None]]:
        result, alike, description = work()
        told = None if description is None else report(description)
        compared = [Values(alike, "the configuration")]
        return Outcome((result, description), compared, (told, groups_in_use()))

    (result, description), told = agreement.conclude(outcome)
    logs.set_up_logging(is_first=agreement.is_first)
    close_dropped([name for _, names in told for name in names], agreement.ranks)
    return result, description, [each for each, _ in told]


def shard(
    description: Description,
    *,
    settings: TPTrainingConfig,
    group: TPGroup,
    agreement: Agreement,
    reports: Sequence[RankReport],
    example_inputs: Mapping[str, object] | None = None,
    data: TrainingData | None = None,
    device: torch.device | None = None,
    weights: FileWeights | None = None,
    large_names: tuple[str, ...] | None = None,
) -> TensorParallel:
    """Shard a model over ``group``, keeping every Parameter object.

    Shards go to ``device``, or where the weights are; with ``weights`` each rank reads its own from
    files. ``agreement`` spans all ranks, and ``reports`` are theirs: ValueError on all, with the
    model unchanged, where one cannot plan, plans differently, or a check differs.
    """
    group.set_hosts({each.rank: str(each.host) for each in reports})
    location = _location(description, group, reports, weights, device)
    watch = Stopwatch()
    task = _Task(description, settings, group, location, device, weights, large_names)
    local = agreement.within(group)
    first = functools.partial(_first_plan, task, example_inputs, data, local)
    to_check, on_twins = agreement.conclude(first)
    if any(on_twins) and not all(on_twins):  # TP groups whose models differ
        to_check, _ = agreement.conclude(functools.partial(first, on_twin=False))
    watch.note("plan")
    spans = spanning_warning(reports, group.size)
    _warn(agreement, [*to_check.plan.messages, *filter(None, [spans])])
    remove_zero_partitioning(description.parameters)
    if "cpu" in (location.device.type, (device or location.device).type):
        group.share_memory()
    (plan, request), conversion, on_failure = _converted(task, to_check, agreement, local)
    with on_failure:  # as where a rank has ended, or of an interrupt
        watch.note("self-check" if to_check.is_checked else "convert")
        _share_weights(task, to_check, local)
        warning = None if description.replaced_later else plan.replicated_warning()
        if warning:
            _warn(agreement, [f"{type(task.model).__name__}: {warning}"])
        on_failure.pop_all()
    _commit(conversion, agreement, device)
    state = _attached(task, plan, request)
    watch.note("shard")
    log_report(description, plan, request, watch, is_first=agreement.is_first)
    AdapterChanges(state, settings=settings, request=request, conversion=conversion).start()
    return state


def _location(
    description: Description,
    group: TPGroup,
    reports: Sequence[RankReport],
    weights: FileWeights | None,
    device: torch.device | None,
) -> WeightLocation:
    if weights is None:
        return locate_weights(description, group, reports)
    return WeightLocation(device or torch.device("cpu"), only_on_rank0=False, in_files=True)


def _share_weights(task: _Task, to_check: CheckedPlan, local: Agreement) -> None:
    """Give all ranks of a TP group the same weights, where none was given them for a check."""
    if task.weights is not None:
        what, drawn = type(task.model).__name__, list(task.weights.values.values())
        broadcast_tensors(what, drawn, task.group, agreement=local, keep=False)
    elif to_check.inputs is None and task.location.on_every_rank:
        broadcast_weights(task.description, task.group, agreement=local, keep=False)


def _warn(agreement: Agreement, warnings: Sequence[str]) -> None:
    if agreement.is_first:
        for warning in warnings:
            _log.warning("%s", warning)


def _first_plan(
    task: _Task,
    example_inputs: Mapping[str, object] | None,
    data: TrainingData | None,
    local: Agreement,
    *,
    on_twin: bool = True,
) -> Outcome[CheckedPlan]:
    """The first plan, and what its self-check will run on."""
    found = plan_to_check(
        task.description,
        task.settings,
        example_inputs,
        data,
        ranks=task.group.size,
        agreement=local,
        location=task.location,
        on_twin=on_twin,
        large_names=task.large_names,
    )
    return Outcome(found.result, [*found.compared, *_rest(task.model)], found.told)


def _rest(model: nn.Module) -> list[Compared]:
    """What of the ranks' models has to be the same and no plan tells."""
    buffers = {name: f"{list(b.shape)} {b.dtype}" for name, b in model.named_buffers()}
    modules = {
        name or "the model": f"{type(module).__name__}({module.extra_repr()})"
        for name, module in model.named_modules()
    }
    return [
        Values(buffers, "the model's buffers"),
        Values(modules, "what the model is made of"),
        Values(config_values(model), "the model's configuration"),
    ]


def _converted(
    task: _Task, to_check: CheckedPlan, agreement: Agreement, local: Agreement
) -> tuple[Planned, Conversion, ExitStack]:
    """The plan that the self-check found to be right, and the model converted but for its weights,
    which is undone where any rank fails, and by what is returned.

    Where the TP groups have come to different plans, as with weights that differ between them, all
    ranks of the run check together.
    """
    for checking in (local, agreement):
        with ExitStack() as on_failure:
            work = functools.partial(_convert, task, to_check, checking, on_failure)
            found, plans = agreement.conclude(work)
            if len(set(plans)) == 1:
                return *found, on_failure.pop_all()
    raise AssertionError("ranks that agree about every step have different plans")


def _convert(
    task: _Task, to_check: CheckedPlan, agreement: Agreement, on_failure: ExitStack
) -> Outcome[tuple[Planned, Conversion]]:
    if to_check.inputs is not None:  # a run of the model itself, for which ranks have one model
        local = agreement.within(task.group)
        on_failure.callback(
            broadcast_weights(task.description, task.group, agreement=local, keep=True)
        )
    planned = to_check.checked(
        task.description, task.settings, group=task.group, agreement=agreement
    )
    plan = planned[0]
    conversion = _conversion(task, plan)
    on_failure.callback(conversion.undo)
    _switch(task, conversion)
    return Outcome((planned, conversion), told=plan.hash)


def _conversion(task: _Task, plan: Plan) -> Conversion:
    overlap = task.settings.overlaps
    if task.weights is not None:
        return LoadShards(
            task.description,
            plan=plan,
            group=task.group,
            overlap=overlap,
            weights=task.weights,
            device=task.location.device,
        )
    if not task.location.only_on_rank0:
        return Conversion(task.description, plan=plan, group=task.group, overlap=overlap)
    return ScatterFromRank0(
        task.description,
        plan=plan,
        group=task.group,
        overlap=overlap,
        source=task.location.device,
        device=task.device or task.location.device,
    )


def _switch(task: _Task, conversion: Conversion) -> None:
    """Do everything of the conversion but shard the weights."""
    conversion.switch()
    insist = task.insists_on_sharded_logits
    why = conversion.keep_logits(insist=insist)
    if why and insist:
        raise ValueError(
            f"tensor_parallel.vocab_parallel_lm_head: got true, but {why}; leave the key out"
        )
    if why:
        _log.info("the logits are gathered in training: %s", why)
    conversion.check_memory(task.device)


@torch.no_grad()
def _commit(conversion: Conversion, agreement: Agreement, device: torch.device | None) -> None:
    if not isinstance(conversion, (ScatterFromRank0, LoadShards)):
        conversion.commit(device)
        return
    what = "reading" if isinstance(conversion, LoadShards) else "scattering"

    def scatter() -> None:
        try:
            conversion.commit(device)
        except PeerFailed:  # whose own error says why
            pass
        except Exception as error:
            raise RuntimeError(
                f"{what} the weights failed, and no rank has a model now: {error}"
            ) from error

    agreement.together(scatter)


def _refuse_local_maps(model: nn.Module) -> None:
    if refuse_local_maps not in output_hooks(model):
        model.register_forward_hook(refuse_local_maps)


def _attached(task: _Task, plan: Plan, request: PlanRequest) -> TensorParallel:
    group, parameters = task.group, task.description.parameters
    device = parameters[0].device
    if device.type == "cpu" and group.cpu_handle is not group.handle:
        device = torch.device("cuda")
    broadcast_rng_state(group, device=device)
    state = TensorParallel(
        plan=plan,
        group=group,
        parameters=parameters,
        settings=compared(task.settings),
        recipe=recipe(task.description, task.settings, request),
    )
    attach(task.model, state)
    guard_save_pretrained(task.model, is_sharded=state.is_sharded)
    count_full_parameters(task.model)
    if sharded_4bit(parameters):
        refuse_dequantize(task.model)
    state.hook(_refuse_local_maps)
    return state
