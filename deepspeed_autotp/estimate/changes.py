# SPDX-License-Identifier: Apache-2.0
"""What a run does to a model before it is sharded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Changes:
    """``dtype`` is a name of the core, such as "bfloat16"; ``lora`` are arguments of
    LoraConfig."""

    dtype: str | None = None
    checkpointing: bool = False
    lora: Mapping[str, Any] | None = None
