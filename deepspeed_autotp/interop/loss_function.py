# SPDX-License-Identifier: Apache-2.0
"""The ``loss_function`` of a transformers model, which can be replaced."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_SHIFTS = {"ForCausalLMLoss": True, "ForMaskedLMLoss": False}


def shifts_labels(model: Any) -> bool | None:
    """Whether the labels of ``model`` are those of the next token; None where its forward, or its
    ``loss_function``, is none of transformers that gives logits to a cross-entropy."""
    loss = getattr(model, "loss_function", None)
    name = getattr(loss, "__name__", "")
    if getattr(loss, "__module__", "") != "transformers.loss.loss_utils" or name not in _SHIFTS:
        return None
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    is_asked = "loss_function" in getattr(code, "co_names", ())
    # A forward that was replaced, as by TRL and Liger, is the model's own attribute.
    return _SHIFTS[name] if is_asked and "forward" not in vars(model) else None


def replace_loss(model: Any, loss: Callable[..., Any]) -> Callable[[], None]:
    """Make ``loss`` the loss function of a transformers model; returns the undo, which keeps one
    that others have put there since."""
    before = vars(model).get("_loss_function")
    model.loss_function = loss

    def back() -> None:
        if vars(model).get("_loss_function") is not loss:
            return
        if before is None:
            del model._loss_function
        else:
            model.loss_function = before

    return back
