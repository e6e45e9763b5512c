# SPDX-License-Identifier: Apache-2.0
"""Spellings of a data type as torch data types; the core knows the spellings."""

from __future__ import annotations

import torch

from deepspeed_autotp import _core
from deepspeed_autotp.config.validation import shown

__all__ = ["named_dtype", "parse_dtype"]

_BY_NAME = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
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
