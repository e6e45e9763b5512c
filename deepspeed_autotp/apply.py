# SPDX-License-Identifier: Apache-2.0
"""Plan, agree, try, commit: the way of a model from whole to sharded.

Until the commit nothing about the model has changed, and every failure is one error on every
rank; in the commit nothing can fail.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from deepspeed_autotp import interop
from deepspeed_autotp._core import Plan, Rules
from deepspeed_autotp.agree import Agreement
from deepspeed_autotp.config import TPTrainingConfig
from deepspeed_autotp.convert import Conversion
from deepspeed_autotp.describe import Description, describe
from deepspeed_autotp.group import TPGroup, host_group
from deepspeed_autotp.replicas import share_random_state, share_weights
from deepspeed_autotp.rules import AutoTPConfig, build_rules
from deepspeed_autotp.sharded import TensorParallel, attach, find_tensor_parallel
from deepspeed_autotp.trial import PeerFailed, Trial

_log = logging.getLogger("deepspeed_autotp")

# A trial runs the whole model three times over sixteen tokens. Beyond this many parameters
# that takes minutes on a host, so it runs only where it is asked for.
_LARGEST_TRIAL = 2_000_000_000


def make_plan(description: Description, settings: TPTrainingConfig, *, ranks: int) -> Plan:
    """The plan for ``ranks`` ranks; ValueError when no rule says how to cut the model."""
    partition = settings.get_partition_config_object()
    if partition is None:
        partition = AutoTPConfig()
        rules = _model_rules(description)
    else:
        rules = build_rules(partition)
    return Plan(
        description.model,
        rules,
        ranks=ranks,
        grain=settings.tensor_parallel.tp_grain_size,
        strict=partition.strict_mode,
        defaults=partition.use_default_specs,
        embedding_dim=partition.embedding_partition_dim,
        head_patterns=partition.lm_head_patterns,
    )


def _model_rules(description: Description) -> Rules:
    model = description.modules[""]
    plan = interop.tp_plan(model)
    if not plan:
        raise ValueError(
            f"{type(model).__name__} has no tensor-parallel plan of its own, and the configuration "
            "gives none. Set tensor_parallel.preset_model to a preset that fits, or list the "
            "layers to cut in tensor_parallel.partition_config."
        )
    rules = Rules()
    for pattern, style in plan.items():
        rules.add_style(pattern, style)
    return rules


def shard(
    model: nn.Module,
    *,
    settings: TPTrainingConfig,
    group: TPGroup,
    agreement: Agreement,
    example_inputs: Mapping[str, object] | None = None,
) -> TensorParallel:
    """Shard ``model`` over ``group``, keeping every Parameter object.

    ``agreement`` spans all ranks that make this call. ValueError on all of them, with the
    model unchanged, when any rank cannot plan, plans differently, or the trial differs.
    """

    def plan_all() -> tuple[Description, Plan]:
        _refuse(model)
        description = describe(model)
        return description, make_plan(description, settings, ranks=group.size)

    description, plan = agreement.together(plan_all)
    agreement.same_plan(plan)
    for note in plan.notes:
        _log.warning("%s", note)
    nearby = _nearby(group, description)
    share_weights(description, nearby, agreement=agreement)
    _try(model, description, plan, nearby, agreement, settings.self_check, example_inputs)

    conversion = Conversion(description, plan=plan, group=group)
    with torch.no_grad():
        conversion.commit()
    conversion.switch()
    share_random_state(nearby)
    state = TensorParallel(plan=plan, group=group, parameters=description.parameters)
    attach(model, state)
    return state


def _refuse(model: nn.Module) -> None:
    if find_tensor_parallel(model) is not None:
        raise ValueError(f"{type(model).__name__} is sharded already; shard a model once")
    for name, parameter in model.named_parameters():
        if interop.is_partitioned(parameter):
            raise ValueError(
                f"{name} is partitioned by deepspeed.zero.Init already. Build the model outside of "
                "zero.Init (with transformers: create it before the ZeRO 3 configuration "
                "object); ZeRO 3 partitions the shards in initialize."
            )
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device; load its weights before sharding")


def _nearby(group: TPGroup, description: Description) -> TPGroup:
    """A group over the same ranks that can move the model's tensors where they lie now."""
    device = next(iter(description.parameters)).device
    if device.type == group.device.type:
        return group
    return TPGroup(host_group(group.global_ranks)) if device.type == "cpu" else group


def _try(
    model: nn.Module,
    description: Description,
    plan: Plan,
    group: TPGroup,
    agreement: Agreement,
    wanted: bool | str,
    example_inputs: Mapping[str, object] | None,
) -> None:
    """Run the trial where it is wanted and possible; ValueError on every rank if it differs."""
    if wanted is False:
        return
    device = next(iter(description.parameters)).device
    inputs = example_inputs or interop.trial_inputs(model, device=device)
    if inputs is None:
        if wanted is True:
            raise ValueError(
                f"self_check is on, but what {type(model).__name__} takes as input is not known; "
                "pass example_inputs to deepspeed_autotp.parallelize"
            )
        _log.info("no trial: the inputs of %s are not known", type(model).__name__)
        return
    if wanted != True and sum(p.numel() for p in model.parameters()) > _LARGEST_TRIAL:  # noqa: E712
        _log.info("no trial of a model this large; self_check: true runs it")
        return

    def run() -> None:
        try:
            problem = Trial(model, description, plan).problem(inputs, group=group)
        except PeerFailed:
            return  # the rank that failed has the words
        if problem is not None:
            raise ValueError(f"the sharded model is not the whole model: {problem}")

    agreement.together(run)


def world_agreement() -> Agreement:
    """Agreement over all ranks of the default process group."""
    assert dist.group.WORLD is not None
    return Agreement(dist.group.WORLD)
