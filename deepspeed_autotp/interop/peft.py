# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapters: the model inside of them, and which of them are plain LoRA."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp.interop.torch_private import own_parameters, submodules


def without_adapters(model: nn.Module) -> nn.Module:
    """The model inside of a PEFT model, at "base_model.model"; any other model itself."""
    if not type(model).__module__.startswith("peft."):
        return model
    inner = getattr(getattr(model, "base_model", None), "model", None)
    return inner if isinstance(inner, nn.Module) else model


def has_adapters(model: nn.Module) -> bool:
    """Whether ``save_pretrained`` of ``model`` writes adapters only."""
    is_wrapped = type(model).__module__.startswith("peft.")
    return is_wrapped or bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_names(model: nn.Module) -> set[str]:
    """The names of the tensors of ``model`` that are saved with its adapter.

    ValueError unless it has one adapter.
    """
    peft_model: Any = model
    adapters = list(peft_model.peft_config)
    if len(adapters) != 1:
        raise ValueError(
            f"save_pretrained: got the adapters {adapters}, expected one; for each of them call "
            "deepspeed_autotp.full_state_dict(model) on every rank, then on rank 0 "
            "model.save_pretrained(folder, state_dict=full, selected_adapters=[name])"
        )
    found = model.state_dict(keep_vars=True)
    stand_ins = {name: torch.empty(1) for name in found}
    peft = importlib.import_module("peft")
    saved = peft.get_peft_model_state_dict(
        model, state_dict=dict(stand_ins), adapter_name=adapters[0]
    )
    wanted = {id(tensor) for tensor in saved.values()}
    return {name for name, tensor in stand_ins.items() if id(tensor) in wanted}


def write_adapters(model: nn.Module, folder: Path, full: dict[str, Tensor]) -> None:
    """Write the adapter of ``model``, whose tensors ``full`` has, as PEFT does."""
    saved: Any = model
    type(saved).save_pretrained(saved, folder, state_dict=full)


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
