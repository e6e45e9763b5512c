# SPDX-License-Identifier: Apache-2.0
"""What a plan was made from, as JSON: so that one for another TP size is made of it without ranks.

It is kept with a checkpoint, beside the configuration of the model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from deepspeed_autotp._core import Plan
from deepspeed_autotp.config.dtypes import named_dtype
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.interop.configured_model import model_class, set_tp_plan
from deepspeed_autotp.interop.transformers import tp_plan
from deepspeed_autotp.planning.model_description import Description, describe, dtype_name
from deepspeed_autotp.planning.planner import PlanRequest, make_plan

# What of the section ``tensor_parallel`` decides on a plan, but for its size.
_SETTINGS = ("preset_model", "partition_config", "vocab_parallel_lm_head", "expert_partition")


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
    """The recipe of a model that is in nobody's checkpoint: no rules of the user's, and no block
    that the self-check found to be wrong."""
    return recipe(describe(model), TPTrainingConfig(), PlanRequest())


def plan_of(made_from: Mapping[str, Any], model: nn.Module, *, ranks: int) -> Plan:
    """The plan of the same recipe for ``ranks`` ranks; ``model`` needs no values.

    KeyError, TypeError or ValueError for what :func:`recipe` has not made.
    """
    _set_dtypes(model, made_from["dtypes"])
    set_tp_plan(model, made_from["tp_plan"])
    given = dict(made_from["settings"])
    if given["partition_config"] is not None:
        given["partition_config"] = {**given["partition_config"], "tp_size": ranks}
    request: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in made_from["request"].items()
    }
    return make_plan(
        describe(model),
        TPTrainingConfig(autotp_size=ranks, **given),
        ranks=ranks,
        request=PlanRequest(**request),
    )


def _dtypes(description: Description) -> dict[str, Any]:
    """The dtype of most parameters, and by name those of the others."""
    found = {
        name: dtype_name(parameter.dtype)
        for name, parameter in description.modules[""].named_parameters()
    }
    most = Counter(found.values()).most_common(1)[0][0]
    return {"most": most, "others": {n: dtype for n, dtype in found.items() if dtype != most}}


def _set_dtypes(model: nn.Module, dtypes: Mapping[str, Any]) -> None:
    for name, parameter in model.named_parameters():
        spelling = dtypes["others"].get(name, dtypes["most"])
        parameter.data = parameter.data.to(named_dtype(spelling))
