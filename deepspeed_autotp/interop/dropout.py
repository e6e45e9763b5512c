# SPDX-License-Identifier: Apache-2.0
"""Whether the modules of a model say that they drop in training."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

_MODULES = (
    nn.AlphaDropout,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.FeatureAlphaDropout,
)


def declares_dropout(model: nn.Module) -> bool:
    """Whether a dropout module has a probability, or a module or its configuration has a positive
    number under a name with "drop" in it, as ``attention_dropout`` and ``attn_pdrop`` are."""
    configs = {}
    for module in model.modules():
        if isinstance(module, _MODULES) and module.p > 0:
            return True
        if isinstance(module, nn.RReLU) or _names_dropout(vars(module)):
            return True
        config = vars(module).get("config")
        if hasattr(config, "__dict__"):
            configs[id(config)] = config
    return any(_names_dropout(vars(config)) for config in configs.values())


def _names_dropout(values: Mapping[str, object]) -> bool:
    return any(
        isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        for key, value in values.items()
        if isinstance(key, str) and "drop" in key.lower()
    )
