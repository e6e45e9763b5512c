# SPDX-License-Identifier: Apache-2.0
"""Spellings of a data type as torch data types; the core knows the spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deepspeed_autotp.config.dtype_names import canonical_dtype, config_dtype

__all__ = ["SAFETENSORS_NAMES", "infer_config_dtype", "named_dtype", "parse_dtype"]

_BY_NAME = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

# The names in safetensors files, in the order in which safetensors 0.8 has them.
SAFETENSORS_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}


def named_dtype(name: str) -> torch.dtype:
    """The torch data type of one of the core's canonical names, such as "bfloat16"."""
    return _BY_NAME[name]


def parse_dtype(value: object, where: str) -> torch.dtype:
    """A torch data type, or any usual spelling of one ("bf16", "torch.bfloat16", "half").

    Raises ValueError as ``canonical_dtype``.
    """
    spelling = str(value) if isinstance(value, torch.dtype) else value
    return named_dtype(canonical_dtype(spelling, where))


def infer_config_dtype(config_dict: Mapping[str, Any]) -> torch.dtype | None:
    """The data type that ``bf16.enabled`` or ``fp16.enabled`` asks for; "auto" asks for none."""
    name = config_dtype(config_dict)
    return None if name is None else named_dtype(name)
