# SPDX-License-Identifier: Apache-2.0
"""What the trial of a model is run with, if it is tried at all."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping

import torch
from torch import nn

from deepspeed_autotp import interop
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.planning.model_description import Description

_log = logging.getLogger("deepspeed_autotp")

# A trial runs the whole model three times over sixteen tokens. Beyond this many parameters
# that takes minutes on a host, so it runs only where it is asked for, or where nobody wrote the
# rules.
_LARGEST_TRIAL = 2_000_000_000


class Inputs:
    """Keyword arguments of the model; ``insist`` where a trial that cannot run is an error."""

    def __init__(self, values: Mapping[str, object], *, insist: bool) -> None:
        self.values = values
        self.insist = insist


def agreed_inputs(
    model: nn.Module,
    description: Description,
    settings: TPTrainingConfig,
    given: Mapping[str, object] | None,
    agreement: Agreement,
    *,
    by_first: bool,
) -> Inputs | None:
    """What the trial is run with, the same on every rank, or None for no trial.

    There is none where only the first rank of each model holds weights, ``by_first``. ValueError
    on every rank when the trial was asked for and cannot be, as when no inputs are known, or when
    the ranks were given different ones.
    """
    if by_first:
        agreement.together(lambda: _untriable(model, settings, given, warn=agreement.is_first))
        return None
    inputs = agreement.together(
        lambda: _inputs(model, description, settings, given, warn=agreement.is_first)
    )
    values = {} if inputs is None else inputs.values
    said = {f"example_inputs[{key!r}]": _digest(value) for key, value in values.items()}
    agreement.same({"a trial": str(inputs is not None), **said}, "what the trial is run with")
    return inputs


def _inputs(
    model: nn.Module,
    description: Description,
    settings: TPTrainingConfig,
    given: Mapping[str, object] | None,
    *,
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
    if values is None:
        values = interop.token_inputs(model, device=description.parameters[0].device)
    if values is None:
        _untried(name, settings, insist=insist, warn=warn)
        return None
    ruled = settings.get_partition_config_object() is not None or interop.tp_plan(model)
    if ruled and not insist and sum(p.numel() for p in model.parameters()) > _LARGEST_TRIAL:
        if warn:
            _log.info("no trial of a model this large; self_check: true runs it")
        return None
    return Inputs(values, insist=insist)


def _untriable(
    model: nn.Module,
    settings: TPTrainingConfig,
    given: Mapping[str, object] | None,
    *,
    warn: bool,
) -> None:
    """A warning, or a ValueError where a trial was asked for, of ranks that have no weights."""
    if settings.self_check is False:
        return
    name = type(model).__name__
    why = f"only the first rank of each model holds the weights of {name}"
    asked = {
        "self_check": settings.self_check is True,
        "example_inputs": given is not None,
        "sequence_parallel": settings.sequence_parallel,
    }
    if keys := [key for key, is_on in asked.items() if is_on]:
        raise ValueError(
            f"{keys[0]} asks for a trial of the plan, which all ranks run with whole weights, but "
            f"{why}; load them on every rank, or set tensor_parallel.self_check to false"
        )
    if warn:
        _log.warning(
            "the plan for %s is not tried, since %s: a wrong rule would train wrongly in silence. "
            "Load the weights of a smaller model of its kind on every rank to have the plan tried, "
            "and set tensor_parallel.self_check to false once it was.",
            name,
            why,
        )


def _untried(name: str, settings: TPTrainingConfig, *, insist: bool, warn: bool) -> None:
    """A warning, or a ValueError where a trial was insisted on, for a model of unknown inputs."""
    if insist:
        key = "sequence_parallel" if settings.sequence_parallel else "self_check"
        raise ValueError(
            f"{key} is on, but what {name} takes as input is not known; "
            "pass example_inputs to deepspeed_autotp.parallelize"
        )
    if warn:
        _log.warning(
            "the plan for %s is not tried, since what it takes as input is not known: a wrong "
            "rule would train wrongly in silence. Pass example_inputs to "
            "deepspeed_autotp.parallelize, which may come before initialize, or set "
            "tensor_parallel.self_check to false.",
            name,
        )


def _digest(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    data = bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{list(value.shape)} {hashlib.blake2b(data, digest_size=8).hexdigest()}"
