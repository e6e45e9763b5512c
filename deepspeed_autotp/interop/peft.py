# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapters: the model inside of them, and which of them are plain LoRA."""

from __future__ import annotations

from torch import nn

from deepspeed_autotp.interop.torch_private import own_parameters, submodules


def without_adapters(model: nn.Module) -> nn.Module:
    """The model inside of a PEFT model, at "base_model.model"; any other model itself."""
    if not type(model).__module__.startswith("peft."):
        return model
    inner = getattr(getattr(model, "base_model", None), "model", None)
    return inner if isinstance(inner, nn.Module) else model


# Submodules of a LoRA layer. The factors of an embedding are parameters, and replicated.
_LORA_MODULES = frozenset({"base_layer", "lora_dropout", "lora_A", "lora_B"})
_LORA_OF_EMBEDDING = frozenset({"lora_embedding_A", "lora_embedding_B"})


def unsupported_adapter(model: nn.Module) -> str:
    """The name of a layer with an adapter that is not plain LoRA; empty where there is none."""
    name: str
    for name, module in model.named_modules():
        if "base_layer" not in submodules(module):
            continue
        is_plain = not own_parameters(module) and all(
            _is_lora(key, child) for key, child in submodules(module).items() if child is not None
        )
        if not is_plain:
            return name
    return ""


def _is_lora(key: str, child: nn.Module) -> bool:
    if key in _LORA_MODULES:
        return key == "base_layer" or not isinstance(child, nn.ParameterDict)
    return key in _LORA_OF_EMBEDDING or next(child.parameters(), None) is None
