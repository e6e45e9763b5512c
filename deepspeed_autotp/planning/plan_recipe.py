# SPDX-License-Identifier: Apache-2.0
"""What a plan was made from, as JSON: so that one for another TP size is made of it without ranks.

It is kept with a checkpoint, beside the configuration of the model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from deepspeed_autotp._core import Plan
from deepspeed_autotp.config.dtypes import parse_dtype
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.config.validation import problems
from deepspeed_autotp.interop.configured_model import model_class, set_tp_plan
from deepspeed_autotp.interop.transformers import tp_plan
from deepspeed_autotp.planning.model_description import Description, describe, dtype_name
from deepspeed_autotp.planning.planner import PlanRequest, make_plan

# What of the section ``tensor_parallel`` decides on a plan, but for its size.
_SETTINGS = ("preset_model", "partition_config", "vocab_parallel_lm_head", "expert_partition")


@dataclass(frozen=True, slots=True)
class _Dtypes:
    """The dtype of most parameters, and by name those of the others."""

    most: str
    others: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What :func:`recipe` gives; ``model`` is for who makes it."""

    model: str | None
    dtypes: _Dtypes
    tp_plan: dict[str, str]
    settings: dict[str, Any]
    request: PlanRequest


_RECIPE = TypeAdapter(_Recipe)


def recipe(
    description: Description, settings: TPTrainingConfig, request: PlanRequest
) -> dict[str, Any] | None:
    """What ``request`` was answered from. None where the rules cannot be written as JSON."""
    model = description.modules[""]
    given = {key: value for key, value in settings if key in _SETTINGS}
    content = {
        "model": model_class(model),
        "dtypes": _dtypes(description),
        "tp_plan": tp_plan(model),
        "settings": given | {"tp_grain_size": settings.tensor_parallel.tp_grain_size},
        "request": asdict(request),
    }
    try:
        made: dict[str, Any] = json.loads(json.dumps(content))
    except (TypeError, ValueError):
        return None
    return made


def default_recipe(model: nn.Module) -> dict[str, Any] | None:
    """The recipe of a model of which there is no checkpoint: no rules of the user's, and no block
    that the self-check found to be wrong."""
    return recipe(describe(model), TPTrainingConfig(), PlanRequest())


def plan_of(made_from: Mapping[str, Any], model: nn.Module, *, ranks: int) -> Plan:
    """The plan of the same recipe for ``ranks`` ranks; ``model`` needs no values.

    ValueError for what :func:`recipe` has not made.
    """
    try:
        # By way of JSON, whose lists may be tuples where all types have to be the right ones.
        saved = _RECIPE.validate_json(json.dumps(made_from), strict=True)
    except ValidationError as error:
        raise ValueError(problems(error)[0]) from None
    _set_dtypes(model, saved.dtypes)
    set_tp_plan(model, saved.tp_plan)
    given = dict(saved.settings)
    rules = given.get("partition_config")
    if isinstance(rules, Mapping):
        given["partition_config"] = {**rules, "tp_size": ranks}
    settings = TPTrainingConfig(**(given | {"autotp_size": ranks}))
    return make_plan(describe(model), settings, ranks=ranks, request=saved.request)


def _dtypes(description: Description) -> dict[str, Any]:
    found = {
        name: dtype_name(parameter.dtype)
        for name, parameter in description.modules[""].named_parameters()
    }
    most = Counter(found.values()).most_common(1)[0][0]
    return asdict(_Dtypes(most, {n: dtype for n, dtype in found.items() if dtype != most}))


def _set_dtypes(model: nn.Module, dtypes: _Dtypes) -> None:
    for name, parameter in model.named_parameters():
        spelling = dtypes.others.get(name, dtypes.most)
        parameter.data = parameter.data.to(parse_dtype(spelling, f"dtypes: {name}"))
