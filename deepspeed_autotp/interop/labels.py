# SPDX-License-Identifier: Apache-2.0
"""The argument of a forward for its labels, labels that a model takes, and the loss from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp.interop.peft import without_adapters
from deepspeed_autotp.interop.transformers import model_facts

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


def forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of the forward by name; none where it has no signature to read."""
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}


def labels_argument(model: nn.Module) -> LabelsArgument | None:
    """None where the forward takes no labels, or has no signature to read."""
    parameters = forward_parameters(model)
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positions = [name for name, p in parameters.items() if p.kind in by_position]
    if _LABELS in parameters:
        return LabelsArgument(positions.index(_LABELS) if _LABELS in positions else None)
    any_keyword = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return LabelsArgument(None) if any_keyword else None


def _of_rows(ids: Tensor, classes: int) -> Tensor:
    return torch.arange(ids.shape[0], device=ids.device) % classes


def _of_tokens(ids: Tensor, classes: int) -> Tensor:
    return ids % classes


# By the end of a class name of transformers, which labels go with tokens and a number of classes.
_CLASSIFIERS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "ForSequenceClassification": _of_rows,
    "ForTokenClassification": _of_tokens,
}


def with_labels(model: nn.Module, inputs: Mapping[str, object]) -> dict[str, object] | None:
    """``inputs`` of a transformers model with labels that go with them, or None where none are
    known; inputs that have labels are returned as they are."""
    if inputs.get(_LABELS) is not None:
        return dict(inputs)
    inner = without_adapters(model)
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    facts = model_facts(inner)
    if facts.model_type is None or not isinstance(ids, Tensor) or labels_argument(inner) is None:
        return None
    if facts.output_head is not None:
        return {**inputs, _LABELS: ids}
    # An index that is out of range ends a program on a GPU: nothing is tried that may be.
    classes = getattr(inner.config, "num_labels", 0)
    problem = getattr(inner.config, "problem_type", None)
    for name, labels in _CLASSIFIERS.items():
        if type(inner).__name__.endswith(name) and classes > 1 and problem is None:
            return {**inputs, _LABELS: labels(ids, classes)}
    return None


def loss_of(output: Any) -> Tensor | None:
    """The loss in the output of a model that was given labels: under its name, or else the output
    itself or its first part where that is one number."""
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(output, (tuple, list)):
        found = output[0] if output else None
    else:
        found = getattr(output, "loss", output)
    is_number = isinstance(found, Tensor) and found.dim() == 0 and found.is_floating_point()
    return found if is_number else None
