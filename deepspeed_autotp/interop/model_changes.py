# SPDX-License-Identifier: Apache-2.0
"""What a script does to a model before it trains it: LoRA, activation checkpointing."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from deepspeed_autotp.base.printable import one_line


def with_lora(model: nn.Module, arguments: Mapping[str, Any]) -> nn.Module:
    """A PEFT model around ``model``, on the meta device. ``arguments`` are those of LoraConfig.

    ValueError where PEFT is missing or refuses them.
    """
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError as error:
        raise ValueError("--lora: got LoRA, which needs PEFT: pip install peft") from error
    try:
        config = peft.LoraConfig(task_type="CAUSAL_LM", **arguments)
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT about names of transformers
            made: nn.Module = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    except Exception as error:  # whatever PEFT raises for arguments that it does not take
        raise ValueError(
            f"--lora: PEFT refuses {dict(arguments)}: {one_line(error)} Modules are named like "
            "r=16,target_modules=q_proj+v_proj"
        ) from error
    return made.to(dtype)


def enable_checkpointing(model: nn.Module) -> None:
    """Let a model of transformers run its blocks again in the backward pass.

    ValueError for a model that cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"--gradient-checkpointing: {type(model).__name__} has none, expected a model of "
            "transformers that supports it"
        )
    checkpoint_blocks(model, {"use_reentrant": False})


def checkpoint_blocks(model: Any, options: Mapping[str, Any]) -> None:
    """Enable activation checkpointing with ``options`` of torch.utils.checkpoint, by the name that
    the installed transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs=dict(options))
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(options))
