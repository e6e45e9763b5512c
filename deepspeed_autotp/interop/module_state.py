# SPDX-License-Identifier: Apache-2.0
"""The one attribute in which the package keeps what it knows of a module: ``module._autotp``.

A dictionary with one object of each type: the sharding of a layer, a layer's part in a stack, the
state of a sharded model. It is in the ``__dict__`` of the module, not among its submodules or
parameters, and a copy of the module copies it. Beside it there are methods of modules that are
replaced, under their own names.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn

T = TypeVar("T")

_SLOT = "_autotp"


def state_of(module: nn.Module, kind: type[T]) -> T:
    """The object of type ``kind`` that is kept on ``module``; KeyError where there is none."""
    return cast(T, vars(module)[_SLOT][kind])


def find_state(module: nn.Module, kind: type[T]) -> T | None:
    """As :func:`state_of`, with None instead of the error."""
    return cast("T | None", vars(module).get(_SLOT, {}).get(kind))


def set_state(module: nn.Module, value: object) -> Callable[[], None]:
    """Keep ``value`` on ``module``, in place of another of its type; returns the undo, which
    leaves objects of other types that came since."""
    attributes: dict[str, Any] = vars(module)
    kind = type(value)
    before = attributes.get(_SLOT, {}).get(kind)
    attributes[_SLOT] = {**attributes.get(_SLOT, {}), kind: value}

    def back() -> None:
        kept = {key: each for key, each in attributes.get(_SLOT, {}).items() if key is not kind}
        if before is not None:
            kept[kind] = before
        if kept:
            attributes[_SLOT] = kept
        else:
            attributes.pop(_SLOT, None)

    return back


def replace_method(module: nn.Module, name: str, ours: Callable[..., Any]) -> Callable[[], None]:
    """Let ``ours`` be the method ``name`` of a module whose class has one; returns the undo. A copy
    of the module has it, bound to the copy."""
    if callable(getattr(type(module), name, None)):
        vars(module)[name] = types.MethodType(ours, module)
    return lambda: vars(module).pop(name, None)
