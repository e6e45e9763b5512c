# SPDX-License-Identifier: Apache-2.0
"""A transformers model made of the configuration that is saved beside its weights, without them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepspeed_autotp.interop.layer_counts import check_layer_counts
from deepspeed_autotp.interop.peft import without_adapters
from deepspeed_autotp.interop.versions import required

_PACKAGE = "transformers"


def model_class(model: nn.Module) -> str | None:
    """The name of the class of ``model`` in transformers, or None where it is not one of these, or
    has adapters."""
    cls = type(model)
    is_known = cls.__module__.startswith(f"{_PACKAGE}.models.")
    return cls.__name__ if is_known else None


def set_tp_plan(model: nn.Module, plan: Mapping[str, str]) -> None:
    """Let ``plan`` be the ``tp_plan`` of ``model``."""
    vars(without_adapters(model))["_tp_plan"] = dict(plan)


def configured_model(source: Path, class_name: str | None) -> nn.Module:
    """The model that the file ``source``, or ``config.json`` in that folder, describes, on the meta
    device.

    Of the class ``class_name``, or the first of its architectures. ValueError saying what is
    missing, also for classes that are not in transformers: nothing of a checkpoint is run.
    """
    file = source if source.is_file() else source / "config.json"
    where = repr(str(file))
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{where} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} cannot be read: {error}; expected a model's config.json"
        ) from error
    check_layer_counts(values, where)
    listed = values.get("architectures") if isinstance(values, dict) else None
    name = class_name or (listed[0] if isinstance(listed, list) and listed else None)
    if not isinstance(name, str):
        raise ValueError(
            f"{where} names no architecture: expected the class of a model in it, such as "
            '"architectures": ["LlamaForCausalLM"], which save_pretrained of a model writes'
        )
    transformers: Any = importlib.import_module(_PACKAGE)
    cls = getattr(transformers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ValueError(f"{where} is of a {name[:100]!r}, which transformers does not have")
    from_config = required(cls, "_from_config", project=_PACKAGE, needed_for="the autotp command")
    try:
        config = transformers.AutoConfig.from_pretrained(file, trust_remote_code=False)
        with torch.device("meta"):
            model: nn.Module = from_config(config)
    except Exception as error:  # whatever a class raises for what it does not take
        raise ValueError(f"no {name} can be made of {where}: {error}") from error
    return model
