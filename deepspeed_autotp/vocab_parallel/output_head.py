# SPDX-License-Identifier: Apache-2.0
"""The output head of a model that is given labels: it keeps its part of the logits.

In training with labels the head gives logits that are cut over the ranks; in evaluation, and
without labels, it gathers them as before.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp import interop
from deepspeed_autotp._core import Layer, Plan
from deepspeed_autotp.layers.linear import Sharding, gathered
from deepspeed_autotp.vocab_parallel.logits import spread

_LABELS = "labels"


def output_head(
    modules: Mapping[str, nn.Module], plan: Plan, *, wanted: bool | None
) -> Layer | None:
    """The layer of ``plan`` that can keep its part of the logits, or None.

    ``wanted`` is ``vocab_parallel_lm_head``: False gives None, and True a ValueError that says
    why the model has no such layer.
    """
    if wanted is False:
        return None
    found, problem = _find(modules, plan)
    if wanted and problem:
        raise ValueError(
            f"tensor_parallel.vocab_parallel_lm_head is true, but {problem}; leave the key out"
        )
    return found


def _find(modules: Mapping[str, nn.Module], plan: Plan) -> tuple[Layer | None, str]:
    model = modules[""]
    what = type(model).__name__
    head = interop.model_facts(model).output_head
    if head is None:
        return None, f"{what}.get_output_embeddings() names no output head"
    if _labels_place(model) is None:
        return None, f"{what}.forward takes no {_LABELS}"
    name = next((name for name, m in modules.items() if m is head), "its output head")
    if not isinstance(head, nn.Linear):
        return None, f"{name} is a {type(head).__name__}, no nn.Linear"
    layer = next((x for x in plan.layers if modules[x.module] is head), None)
    if layer is None or layer.kind != "column" or not layer.gather_output:
        return None, f"the plan does not cut {name} along the vocabulary and gather its output"
    entry = plan.entries[layer.weight]
    if any(len(entry.runs(rank)) != 2 for rank in range(plan.ranks)):
        return None, f"a rank's part of {name} is not one run of the vocabulary"
    return layer, ""


class _Place:
    """Where a forward has its labels: by name, and by position where that is possible."""

    def __init__(self, position: int | None) -> None:
        self._position = position

    def holds(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        if kwargs.get(_LABELS) is not None:
            return True
        at = self._position
        return at is not None and at < len(args) and args[at] is not None


def _labels_place(model: nn.Module) -> _Place | None:
    parameters = inspect.signature(model.forward).parameters
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positions = [name for name, p in parameters.items() if p.kind in by_position]
    if _LABELS in parameters:
        return _Place(positions.index(_LABELS) if _LABELS in positions else None)
    named = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return _Place(None) if named else None


class Head:
    """What the output head does with its part of the logits in the forward that runs."""

    def __init__(self, place: _Place) -> None:
        self._place = place
        self._keeps = False

    def give(self, part: Tensor, sharding: Sharding) -> Tensor:
        """The logits [..., V] of a part [..., V/R]."""
        if self._keeps and not torch.compiler.is_compiling():
            return spread(part, sharding.parts, sharding.group)
        return gathered(part, sharding)

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A compiled forward is traced with plain tensors.
        compiled = torch.compiler.is_compiling()
        self._keeps = model.training and not compiled and self._place.holds(args, kwargs)

    def leave(self, model: nn.Module, args: object, output: object) -> None:
        self._keeps = False


def keep_parts(model: nn.Module, head: nn.Module) -> Callable[[], None]:
    """Let ``head``, sharded already, keep its part in training with labels; returns the undo."""
    place = _labels_place(model)
    assert place is not None
    state = Head(place)
    before: Sharding = vars(head)["sharding"]
    vars(head)["sharding"] = dataclasses.replace(before, give=state.give)
    hooks = (
        model.register_forward_pre_hook(state.enter, with_kwargs=True),
        model.register_forward_hook(state.leave, always_call=True),
    )

    def back() -> None:
        vars(head)["sharding"] = before
        for hook in hooks:
            hook.remove()

    return back
