# SPDX-License-Identifier: Apache-2.0
"""A model by the words that a user names it with, on the meta device."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepspeed_autotp import _core
from deepspeed_autotp.base.printable import one_line
from deepspeed_autotp.interop.configured_model import configured_model
from deepspeed_autotp.interop.layer_counts import check_layer_counts
from deepspeed_autotp.interop.model_forms import BETWEEN_OVERRIDES, FORMS

_LONGEST = 400  # of what transformers says, which may list all of its classes


def named_model(text: str, *, dtype: torch.dtype | None = None, device: str = "meta") -> nn.Module:
    """The model that ``text`` names in one of FORMS, without values.

    ``dtype`` is that of its weights; by default what its configuration or its factory says.
    ``device`` is where a factory makes it, with values where that is not "meta".
    ValueError for what names no model, or one that cannot be made.
    """
    model = _named(text, device)
    return model if dtype is None else model.to(dtype)


def is_factory(text: str) -> bool:
    """Whether ``text`` names a function that makes the model. ValueError for what names none."""
    return _form(text) is _of_factory


def _named(text: str, device: str) -> nn.Module:
    return _form(text)(text, device)


def _form(text: str) -> Callable[[str, str], nn.Module]:
    name, colon, rest = text.partition(":")
    types = _transformers().CONFIG_MAPPING
    is_folder = os.path.isfile(os.path.join(text, "config.json"))
    if name in types and not is_folder:
        return _of_type
    if os.path.exists(text):
        return _of_file
    if colon and rest.isidentifier():
        return _of_factory
    near = _core.nearest(name, list(types))
    raise ValueError(
        f"MODEL: got {text!r}, expected {FORMS}; there is no such file, and names on the Hugging "
        "Face Hub are not looked up: download the config.json"
        + (f"; near model types are {', '.join(near)}" if near else "")
    )


def _transformers() -> Any:
    return importlib.import_module("transformers")


def _of_file(text: str, device: str) -> nn.Module:
    return configured_model(Path(text), None)


def _of_type(text: str, device: str) -> nn.Module:
    transformers = _transformers()
    name, _, overrides = text.partition(":")
    values = dict(_override(each) for each in BETWEEN_OVERRIDES.split(overrides) if each)
    check_layer_counts(values, f"MODEL: {name}")
    config = transformers.AutoConfig.for_model(name)
    for key in values:
        if not hasattr(config, key):
            near = _core.nearest(key, list(config.to_dict()))
            raise ValueError(
                f"MODEL: {name} has no {key!r} in its configuration"
                + (f"; near names are {', '.join(near)}" if near else "")
            )
    try:
        config = transformers.AutoConfig.for_model(name, **values)
        maker = _maker(transformers, config)
        with torch.device("meta"):
            model: nn.Module = maker.from_config(config)
    except Exception as error:  # whatever a class raises for what it does not take
        why = one_line(error, longest=_LONGEST)
        raise ValueError(f"MODEL: no {name} can be made with {values}: {why}") from error
    return model


def _maker(transformers: Any, config: Any) -> Any:
    """A class that has an output head, where there is one for the configuration."""
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModel


def _override(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"MODEL: got {text!r} among the overrides, expected key=value")
    try:
        return key.strip(), json.loads(value)
    except (ValueError, RecursionError):
        return key.strip(), value


def named_inputs(text: str) -> Mapping[str, object]:
    """What the function ``module:function`` gives: keyword arguments of a model. ValueError for
    what names no such function."""
    module, colon, name = text.partition(":")
    if not colon or not name.isidentifier():
        raise ValueError(
            f"--inputs: got {text!r}, expected module:function, which returns a dictionary of "
            "keyword arguments"
        )
    inputs = _returned("--inputs", module, name, "cpu")
    if not isinstance(inputs, Mapping) or not inputs:
        raise ValueError(
            f"--inputs: {text} returned {type(inputs).__name__}, expected a dictionary of keyword "
            "arguments of the model"
        )
    return {str(key): value for key, value in inputs.items()}


def _of_factory(text: str, device: str) -> nn.Module:
    module, _, name = text.partition(":")
    model = _returned("MODEL", module, name, device)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"MODEL: {module}:{name} returned {type(model).__name__}, expected a torch.nn.Module"
        )
    return model


def _returned(what: str, module: str, name: str, device: str) -> Any:
    """What the function ``name`` of a module returns, which may be in the current folder."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), name)
        with torch.device(device):
            return factory()
    except (Exception, SystemExit) as error:  # a user's module
        made = "no model" if what == "MODEL" else "nothing"
        raise ValueError(
            f"{what}: {module}:{name} made {made}: {type(error).__name__}: {error}"
        ) from error
