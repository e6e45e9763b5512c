# SPDX-License-Identifier: Apache-2.0
"""The argument of a forward for its labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

_LABELS = "labels"


class LabelsArgument:
    """The argument ``labels`` of a forward, given by keyword or by position."""

    def __init__(self, position: int | None) -> None:
        self._position = position

    def is_given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        if kwargs.get(_LABELS) is not None:
            return True
        at = self._position
        return at is not None and at < len(args) and args[at] is not None


def labels_argument(model: nn.Module) -> LabelsArgument | None:
    """None where the forward takes no labels, or has no signature to read."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return None
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positions = [name for name, p in parameters.items() if p.kind in by_position]
    if _LABELS in parameters:
        return LabelsArgument(positions.index(_LABELS) if _LABELS in positions else None)
    any_keyword = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return LabelsArgument(None) if any_keyword else None
