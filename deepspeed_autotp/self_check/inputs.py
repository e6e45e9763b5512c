# SPDX-License-Identifier: Apache-2.0
"""The inputs of a self-check, and whether there is one."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.distributed.comparison import Values
from deepspeed_autotp.distributed.consensus import Agreement, Outcome
from deepspeed_autotp.interop.labels import with_labels
from deepspeed_autotp.interop.transformers import token_inputs, tp_plan
from deepspeed_autotp.planning.model_description import Description
from deepspeed_autotp.self_check.inferred_inputs import TrainingData, inferred_inputs
from deepspeed_autotp.self_check.isolation import seeded
from deepspeed_autotp.sharding.weight_location import WeightLocation

_log = logging.getLogger("deepspeed_autotp")

# A self-check of the model itself runs it a few times, forward and backward. Beyond this many
# parameters that takes minutes on a CPU: it runs where it is asked for, or no rules were written.
_LARGEST_CHECKED = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Inputs:
    """Keyword arguments of the model, and the same with labels, or None where none are known;
    ``insist``: a self-check that cannot run is an error."""

    values: Mapping[str, object]
    labelled: Mapping[str, object] | None
    insist: bool


def agreed_inputs(
    model: nn.Module,
    description: Description,
    settings: TPTrainingConfig,
    given: Mapping[str, object] | None,
    agreement: Agreement,
    *,
    location: WeightLocation,
    data: TrainingData | None,
) -> Inputs | None:
    """The inputs of the self-check, the same on every rank, or None for no self-check.

    There is none where not every rank has the weights. ValueError on every
    rank when a self-check was asked for and cannot be, as when no inputs are known, or when the
    ranks were given different ones.
    """
    if not location.on_every_rank:
        agreement.together(
            lambda: _without_weights(model, settings, given, location, warn=agreement.is_first)
        )
        return None

    def work() -> Outcome[Inputs | None]:
        warn = agreement.is_first
        inputs = _inputs(model, description, settings, given, data=data, warn=warn)
        values = {} if inputs is None else inputs.values
        said = {f"example_inputs[{key!r}]": _digest(value) for key, value in values.items()}
        said["a self-check"] = str(inputs is not None)
        return Outcome(inputs, [Values(said, "the self-check")])

    return agreement.conclude(work)[0]


def _inputs(
    model: nn.Module,
    description: Description,
    settings: TPTrainingConfig,
    given: Mapping[str, object] | None,
    *,
    data: TrainingData | None,
    warn: bool,
) -> Inputs | None:
    name = type(model).__name__
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(
            f"example_inputs: got {type(given).__name__}, expected a dictionary of keyword "
            f"arguments of {name}"
        )
    if settings.self_check is False:
        return None
    insist = settings.self_check is True or given is not None or settings.sequence_parallel
    values = given
    device = description.parameters[0].device
    if values is None:
        values = token_inputs(model, device=device)
    if values is None and data is not None:
        values = _first_batch(data, model, device)
    if values is None:
        values = inferred_inputs(model, device=device)
    if values is None:
        _without_inputs(name, settings, insist=insist, warn=warn)
        return None
    ruled = settings.get_partition_config_object() is not None or tp_plan(model)
    if ruled and not insist and sum(p.numel() for p in model.parameters()) > _LARGEST_CHECKED:
        if warn:
            _log.info(
                "no self-check of a model of this size; tensor_parallel.self_check: true runs it"
            )
        return None
    return Inputs(values, with_labels(model, values), insist)


def _first_batch(
    data: TrainingData, model: nn.Module, device: torch.device
) -> dict[str, object] | None:
    """The same on every rank, also where samples are drawn; None where there is none."""
    try:
        with seeded():
            return data.inputs(model, device=device)
    except Exception as error:  # whatever the samples of a user raise, which training will show
        _log.info("no batch of the training data for the self-check: %s", error)
        return None


def _without_weights(
    model: nn.Module,
    settings: TPTrainingConfig,
    given: Mapping[str, object] | None,
    location: WeightLocation,
    *,
    warn: bool,
) -> None:
    """A warning, or a ValueError where a self-check was asked for, of ranks without weights."""
    if settings.self_check is False:
        return
    name = type(model).__name__
    why = f"only TP rank 0 has the weights of {name}"
    if location.in_files:
        why = f"each rank reads its shards of {name} alone"
    asked = {
        "tensor_parallel.self_check": settings.self_check is True,
        "example_inputs": given is not None,
        "tensor_parallel.sequence_parallel": settings.sequence_parallel,
    }
    if keys := [key for key, is_on in asked.items() if is_on]:
        raise ValueError(
            f"{keys[0]} asks for a self-check, which all ranks run with full weights, but {why}; "
            "load them on every rank, or set tensor_parallel.self_check to false"
        )
    if warn:
        _log.warning(
            "no self-check of the plan for %s, since %s: a wrong rule would train wrongly without "
            "an error. Load the weights of a smaller model of its kind on every rank to check the "
            "plan, then set tensor_parallel.self_check to false.",
            name,
            why,
        )


def _without_inputs(name: str, settings: TPTrainingConfig, *, insist: bool, warn: bool) -> None:
    """A warning, or a ValueError where a self-check has to be, for a model of unknown inputs."""
    if insist:
        key = "sequence_parallel" if settings.sequence_parallel else "self_check"
        raise ValueError(
            f"tensor_parallel.{key}: got true, which needs a self-check, but the inputs of {name} "
            "are not known; pass example_inputs to initialize or parallelize"
        )
    if warn:
        _log.warning(
            "no self-check of the plan for %s, since its inputs are not known: a wrong rule would "
            "train wrongly without an error. Pass example_inputs, keyword arguments of its "
            "forward, to initialize or parallelize, or set tensor_parallel.self_check to false.",
            name,
        )


def _digest(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    data = bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{list(value.shape)} {hashlib.blake2b(data, digest_size=8).hexdigest()}"
