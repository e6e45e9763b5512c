# SPDX-License-Identifier: Apache-2.0
"""The replacement of DeepSpeed's functions by ours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from deepspeed_autotp.interop.deepspeed.module import deepspeed_module

_REPLACED = ("initialize", "tp_model_init")


def install_functions(ours: Mapping[str, Callable[..., Any]]) -> None:
    """Replace DeepSpeed's functions by ours; a second call changes nothing."""
    module = deepspeed_module()
    for name in _REPLACED:
        current = getattr(module, name)
        if not hasattr(current, "deepspeed_original"):
            setattr(module, name, _replacement(ours[name], current))


def uninstall_functions() -> None:
    """Restore DeepSpeed's own functions."""
    module = deepspeed_module()
    for name in _REPLACED:
        current = getattr(module, name)
        setattr(module, name, getattr(current, "deepspeed_original", current))


def _replacement(ours: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(ours)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    written: Any = call
    written.deepspeed_original = original
    return call
