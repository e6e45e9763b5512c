# SPDX-License-Identifier: Apache-2.0
"""Spellings of a data type as torch data types; the core knows the spellings."""

from __future__ import annotations

import torch

from deepspeed_autotp import _core
from deepspeed_autotp.config.validation import shown

__all__ = ["SAFETENSORS_NAMES", "named_dtype", "parse_dtype"]

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

    Raises ValueError, naming `where` and the nearest spellings; a type that no model is trained
    in, such as torch.int8, is refused like an unknown one.
    """
    if not isinstance(value, str | torch.dtype):
        raise ValueError(
            f"{where}: got {shown(value)}, expected a torch dtype or its name, such as 'bf16'"
        )
    return named_dtype(_core.dtype_name(str(value), where))
