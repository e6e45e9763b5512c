# SPDX-License-Identifier: Apache-2.0
"""Accelerate: the data loader that it has prepared last, and the weights that it saves.

A Trainer prepares its training data before its model; ``deepspeed.initialize`` is given the model
alone. A first batch of that data is for the self-check.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import weakref
from collections.abc import Callable
from typing import Any

from deepspeed_autotp.interop.replaced import Replaced, put_method

_METHOD = "prepare_data_loader"
_last: weakref.ref[Any] | None = None


def watch_loaders() -> None:
    """Note each loader that an ``Accelerator`` prepares; nothing without Accelerate, or twice."""
    accelerator = _accelerator()
    if accelerator is not None and not hasattr(vars(accelerator)[_METHOD], "autotp_original"):
        setattr(accelerator, _METHOD, _noting(vars(accelerator)[_METHOD]))


def forget_loaders() -> None:
    """Put Accelerate's own method back."""
    global _last
    _last = None
    accelerator = _accelerator()
    if accelerator is not None:
        own = vars(accelerator)[_METHOD]
        setattr(accelerator, _METHOD, getattr(own, "autotp_original", own))


def last_data() -> tuple[Any, Callable[[list[Any]], Any] | None] | None:
    """Data set and collate function of the loader that was prepared last; None where it is gone."""
    loader = None if _last is None else _last()
    return None if loader is None else (loader.dataset, getattr(loader, "collate_fn", None))


def give_full_state(replaced: Replaced, full_state: Callable[[Any], dict[str, Any] | None]) -> None:
    """Let ``get_state_dict`` of an ``Accelerator`` give what ``full_state`` does, where that is not
    None; ``save_model`` writes it."""

    def ours(original: Callable[..., Any], self: Any, model: Any, *args: Any, **more: Any) -> Any:
        found = full_state(model)
        return original(self, model, *args, **more) if found is None else found

    put_method(replaced, _accelerator(), "get_state_dict", ours)


def _accelerator() -> Any:
    if importlib.util.find_spec("accelerate") is None:
        return None
    return importlib.import_module("accelerate").Accelerator


def _noting(prepare: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(prepare)
    def call(*args: Any, **kwargs: Any) -> Any:
        global _last
        loader = prepare(*args, **kwargs)
        _last = weakref.ref(loader) if hasattr(loader, "dataset") else None
        return loader

    call.autotp_original = prepare  # type: ignore[attr-defined]
    return call
