# SPDX-License-Identifier: Apache-2.0
"""Modules that wrap a model: DeepSpeed's engine, DDP, torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from deepspeed_autotp.interop.torch_private import submodules


def unwrapped(engine_or_model: Any) -> Iterator[nn.Module]:
    """``engine_or_model`` and, from the outside in, the modules it wraps."""
    inner = engine_or_model
    while isinstance(inner, nn.Module):
        yield inner
        inner = submodules(inner).get("_orig_mod") or getattr(inner, "module", None)
