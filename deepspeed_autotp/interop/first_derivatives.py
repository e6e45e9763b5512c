# SPDX-License-Identifier: Apache-2.0
"""Backward passes that cannot be differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import function

_TWICE = (
    "trying to differentiate twice: a gradient that is formed over the TP group was asked for with "
    "create_graph=True, and it cannot be differentiated again; call backward and "
    "torch.autograd.grad without create_graph"
)


def once_differentiable(backward: Callable[..., Any]) -> Any:
    """As torch's, but an error as soon as a graph of ``backward`` is asked for. With torch's the
    error is a part of that graph, which is left out where gradients of named inputs are asked for,
    and their values then lack terms."""
    plain = function.once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            raise RuntimeError(_TWICE)
        return plain(ctx, *gradients)

    return checked
