# SPDX-License-Identifier: Apache-2.0
"""Data types by the core's names, for what does without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed_autotp import _core
from deepspeed_autotp.config.load_config import precision_switches
from deepspeed_autotp.config.validation import shown

__all__ = ["canonical_dtype", "config_dtype"]


def canonical_dtype(value: object, where: str) -> str:
    """The core's name of any usual spelling of a data type: "bf16" -> "bfloat16".

    Raises ValueError, naming `where` and the nearest spellings; a type that no model is trained
    in, such as torch.int8, is refused like an unknown one.
    """
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: got {shown(value)}, expected a torch dtype or its name, such as 'bf16'"
        )
    return _core.dtype_name(value, where)


def config_dtype(config_dict: Mapping[str, Any]) -> str | None:
    """What ``bf16.enabled`` or ``fp16.enabled`` asks for; "auto" asks for none."""
    return _core.precision(*precision_switches(config_dict))
