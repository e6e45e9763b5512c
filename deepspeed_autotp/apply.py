# SPDX-License-Identifier: Apache-2.0
"""Plan, agree, try, commit: the way of a model from whole to sharded.

Until the commit nothing about the model has changed, and every failure is one error on every
rank; in the commit nothing can fail.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from deepspeed_autotp import interop
from deepspeed_autotp._core import Plan, Rules, preset_names
from deepspeed_autotp.agree import Agreement
from deepspeed_autotp.config import TPTrainingConfig
from deepspeed_autotp.convert import Conversion
from deepspeed_autotp.describe import Description, describe
from deepspeed_autotp.group import TPGroup, host_group
from deepspeed_autotp.heads import output_head
from deepspeed_autotp.remains import little_cut
from deepspeed_autotp.replicas import share_random_state, share_weights
from deepspeed_autotp.rules import AutoTPConfig, build_rules
from deepspeed_autotp.sharded import TensorParallel, attach, find_tensor_parallel
from deepspeed_autotp.trial import Trial, agreed_inputs

_log = logging.getLogger("deepspeed_autotp")

# What a user can start from who has to write rules.
_SAMPLE = (
    '{"layer_specs": [{"patterns": [".*\\\\.up\\\\.weight$"], "partition_type": "column"}, '
    '{"patterns": [".*\\\\.down\\\\.weight$"], "partition_type": "row"}]}'
)
# How many of the plan's notes an error repeats.
_NOTES = 3


def make_plan(
    description: Description,
    settings: TPTrainingConfig,
    *,
    ranks: int,
    whole: Sequence[str] = (),
    apart: Sequence[str] = (),
    guesses: bool = True,
) -> Plan:
    """The plan for ``ranks`` ranks; ValueError when the rules cut nothing of the model.

    Whatever the rules say, ``whole`` names modules that stay whole, and ``apart`` those whose
    layers are cut one by one, with whole activations between them. ``guesses`` says whether layers
    are cut because of their names in a model of a type that was never tried.
    """
    given = settings.get_partition_config_object()
    partition = given or AutoTPConfig()
    rules = _model_rules(description) if given is None else build_rules(given)
    plan = Plan(
        description.model,
        rules,
        ranks=ranks,
        grain=settings.tensor_parallel.tp_grain_size,
        strict=partition.strict_mode,
        defaults=partition.use_default_specs,
        embedding_dim=partition.embedding_partition_dim,
        head_patterns=partition.lm_head_patterns,
        whole=whole,
        apart=apart,
        families=given is None,
        guesses=guesses,
    )
    # The default rules cut an embedding also where every pattern of the user has a typo.
    counted = (entry for entry in plan.entries if given is None or entry.source != "default")
    if all(entry.dim < 0 for entry in counted):
        what = type(description.modules[""]).__name__
        if given is None and not len(rules):
            raise ValueError(_no_plan(what, plan, guesses=guesses))
        raise ValueError(
            f"the rules cut nothing of {what}, so that every rank would hold all of it: write "
            "rules for its parameters in tensor_parallel.partition_config"
            + "".join(f"\n  - {note}" for note in plan.notes[:_NOTES])
        )
    return plan


def _model_rules(description: Description) -> Rules:
    rules = Rules()
    for pattern, style in interop.tp_plan(description.modules[""]).items():
        rules.add_style(pattern, style)
    return rules


def _no_plan(what: str, plan: Plan, *, guesses: bool) -> str:
    why = (
        "its layers have no names by which they could be cut"
        if guesses
        else "without a trial its layers are not cut by their names alone (pass example_inputs to "
        "deepspeed_autotp.parallelize)"
    )
    return (
        f"{what} has no tensor-parallel plan of its own, the configuration gives none, and {why}. "
        "Set tensor_parallel.preset_model to a "
        f"preset that fits ({', '.join(preset_names())}), or list the layers to cut in "
        f"tensor_parallel.partition_config, as {_SAMPLE}"
        + "".join(f"\n  - {note}" for note in plan.notes[:_NOTES])
    )


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

    def describe_whole() -> Description:
        _refuse(model)
        return describe(model)

    description = agreement.together(describe_whole)

    inputs = agreed_inputs(model, description, settings, example_inputs, agreement)
    checked = inputs is not None or settings.self_check is False

    def agreed_plan(
        whole: Sequence[str] = (), apart: Sequence[str] = (), *, guesses: bool = checked
    ) -> Plan:
        def make() -> Plan:
            plan = make_plan(
                description,
                settings,
                ranks=group.size,
                whole=whole,
                apart=apart,
                guesses=guesses,
            )
            output_head(description.modules, plan, wanted=settings.vocab_parallel_lm_head)
            return plan

        plan = agreement.together(make)
        agreement.same_plan(plan, [_traits(p) for p in description.parameters])
        return plan

    plan = agreed_plan()
    buffers = {name: f"{list(b.shape)} {b.dtype}" for name, b in model.named_buffers()}
    agreement.same(buffers, "the model's buffers")
    if agreement.is_first:
        for note in plan.notes:
            _log.warning("%s", note)
    interop.make_plain(description.parameters)
    nearby = _nearby(group, description)
    restore = share_weights(description, nearby, agreement=agreement, keep=inputs is not None)

    try:
        if inputs is not None:
            trial = Trial(model, description, plan, group=nearby)
            own_rules = settings.get_partition_config_object() is not None
            again = None if own_rules else agreed_plan
            plan = trial.run(inputs, plan, again=again, agreement=agreement)
        conversion = _switched(description, plan, settings, group=group, agreement=agreement)
    except Exception:
        restore()
        raise
    if agreement.is_first and (remark := little_cut(plan)):
        _log.warning("%s: %s", type(model).__name__, remark)
    with torch.no_grad():
        conversion.commit()
    place = description.parameters[0].device
    share_random_state(nearby, device=group.device if place.type == "cpu" else place)
    state = TensorParallel(plan=plan, group=group, parameters=description.parameters)
    attach(model, state)
    return state


def _switched(
    description: Description,
    plan: Plan,
    settings: TPTrainingConfig,
    *,
    group: TPGroup,
    agreement: Agreement,
) -> Conversion:
    """The conversion with everything done but the cutting; undone where any rank fails."""
    conversion = Conversion(description, plan=plan, group=group)
    try:
        agreement.together(conversion.switch)
        agreement.together(lambda: conversion.keep_logits(settings.vocab_parallel_lm_head))
    except Exception:
        conversion.undo()
        raise
    return conversion


def _traits(parameter: nn.Parameter) -> str:
    """What of a parameter has to be the same on all ranks and is not in the plan."""
    return f"{parameter.dtype} {'trains' if parameter.requires_grad else 'frozen'}"


def compared(settings: TPTrainingConfig) -> dict[str, str]:
    """What all ranks have to be given alike, by the name of the field.

    Process groups differ between ranks by nature.
    """
    values = {
        f"tensor_parallel.{key}": str(value)
        for key, value in settings
        if key not in ("tensor_parallel", "dtype")
    }
    values["tensor_parallel.tp_grain_size"] = str(settings.tensor_parallel.tp_grain_size)
    return values


def _refuse(model: nn.Module) -> None:
    """ValueError for a model whose weights are not there, not whole or not in one place."""
    what = type(model).__name__
    if any(find_tensor_parallel(module) is not None for module in model.modules()):
        raise ValueError(f"{what} is sharded already; shard a model once")
    places: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if _is_dtensor(tensor):
            raise ValueError(
                f"{name} is a DTensor, sharded by somebody else already; load the model without a "
                "tp_plan or device mesh"
            )
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device; load its weights before sharding")
        if not isinstance(tensor, nn.Parameter):
            continue
        places.setdefault(tensor.device, name)
        if tensor.grad is not None:
            raise ValueError(
                f"{name} has a gradient of the whole weight; call model.zero_grad() before"
            )
    if not places:
        raise ValueError(f"{what} has no parameters: there is nothing to shard")
    if len(places) > 1:
        named = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise ValueError(f"the weights lie in several places ({named}); move the model to one")


def _is_dtensor(tensor: Tensor) -> bool:
    """Whether torch's own sharding, as behind transformers' ``tp_plan="auto"``, holds it."""
    # Without the module nobody has made one, and importing it to ask would cost a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _nearby(group: TPGroup, description: Description) -> TPGroup:
    """A group over the same ranks that can move the model's tensors where they lie now."""
    device = next(iter(description.parameters)).device
    if device.type == "cpu" and group.device.type != "cpu":
        return TPGroup(host_group(group.global_ranks))
    return group
