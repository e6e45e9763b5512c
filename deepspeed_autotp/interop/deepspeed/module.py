# SPDX-License-Identifier: Apache-2.0
"""The module ``deepspeed``, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from torch import nn

from deepspeed_autotp.interop.versions import tested_and_found


def versions() -> str:
    """The version of DeepSpeed that is tested, and the one that is installed."""
    return tested_and_found("deepspeed")


def is_engine(model: object) -> bool:
    """Whether ``model`` is an engine of DeepSpeed."""
    return any(
        cls.__name__ == "DeepSpeedEngine" and cls.__module__.startswith("deepspeed.")
        for cls in type(model).__mro__
    )


def has_moe_layers(model: nn.Module) -> bool:
    """Whether ``model`` has layers of ``deepspeed.moe``."""
    kind = importlib.import_module("deepspeed.moe.layer").MoE
    return any(isinstance(module, kind) for module in model.modules())


def deepspeed_module() -> ModuleType:
    """The deepspeed module; ImportError says what to install."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            "initialize and install need DeepSpeed: pip install 'deepspeed>=0.19,<0.20'. "
            "A training loop without DeepSpeed can use deepspeed_autotp.parallelize(model, ...)."
        )
    return importlib.import_module("deepspeed")
