# SPDX-License-Identifier: Apache-2.0
"""How transformers has quantised a model, and which ways a sharded model can have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from deepspeed_autotp.interop.module_state import replace_method

_BITSANDBYTES = "bitsandbytes"
_EIGHT_BITS = ("load_in_8bit", "_load_in_8bit")


def refuse_quantizer(model: nn.Module) -> None:
    """ValueError for a model that is quantised, or whose configuration says so, unless it is in 4
    bits of bitsandbytes."""
    for module in model.modules():
        found = _quantization(module)
        if found is not None:
            refuse_quantization(found)


def refuse_quantization(config: Any) -> None:
    """As ``refuse_quantizer``, of a ``quantization_config``."""
    method = quantization_method(config)
    if method != _BITSANDBYTES:
        raise ValueError(
            f"quantization_config: got {method!r}, expected weights in floating point, or in 4 "
            "bits of bitsandbytes: how the weights of other methods are divided among ranks is "
            "not known; load a checkpoint in bfloat16 or the like, and quantise it with "
            "BitsAndBytesConfig(load_in_4bit=True) where it is too large"
        )
    if any(_values(config).get(key) for key in _EIGHT_BITS):
        raise ValueError(
            "quantization_config: got load_in_8bit, expected load_in_4bit, or weights in floating "
            "point: layers in 8 bits round their input by the largest value of a full row, of "
            "which a rank of a row layer has a part"
        )


def refuse_dequantize(model: nn.Module) -> None:
    """Let ``dequantize`` of the models of transformers in ``model`` be a ValueError: it would put
    other layers, of this rank's shards, in the place of the sharded ones."""
    for module in model.modules():
        replace_method(module, "dequantize", _refuse_dequantize)


def _refuse_dequantize(model: nn.Module, *_: Any, **__: Any) -> None:
    raise ValueError(
        f"dequantize: {type(model).__name__} is sharded, and its layers would be replaced by such "
        "that know nothing of other ranks; dequantise the model before it is sharded"
    )


def quantization_method(config: Any) -> str:
    """What a ``quantization_config`` names, as "gptq" or "bitsandbytes"."""
    values = _values(config)
    method = values.get("quant_method", type(config).__name__)
    return str(getattr(method, "value", method))


def _quantization(module: nn.Module) -> Any:
    """The ``quantization_config`` of a model of transformers, or None."""
    quantizer = vars(module).get("hf_quantizer")
    if quantizer is not None:
        return quantizer.quantization_config
    config = vars(module).get("config")
    return None if config is None else getattr(config, "quantization_config", None)


def _values(config: Any) -> Mapping[str, Any]:
    return config if isinstance(config, Mapping) else vars(config)
