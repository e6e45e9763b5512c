# SPDX-License-Identifier: Apache-2.0
"""A small model that stands for a large one in the self-check.

It is of the same class, made of the same configuration with few layers and small widths, and its
plan has the form of the large one's: what differs in it differs in the large one. It costs a second
whatever the size of the model, and needs no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deepspeed_autotp._core import Plan, index_pattern
from deepspeed_autotp.interop.deepspeed.parameters import full_shape
from deepspeed_autotp.interop.labels import with_labels
from deepspeed_autotp.interop.small_config import (
    factors,
    is_configured,
    layers_to_try,
    narrowed,
    small_model,
    with_layers,
)
from deepspeed_autotp.interop.torch_private import is_hooked
from deepspeed_autotp.interop.transformers import token_inputs
from deepspeed_autotp.planning.model_description import Description, describe
from deepspeed_autotp.self_check.inputs import Inputs
from deepspeed_autotp.self_check.isolation import isolated, seeded
from deepspeed_autotp.self_check.runs import Runs

# A twin beyond these costs more than it is worth.
_MOST_LAYERS = 16
_LARGEST = 150_000_000
# Below this a small model is made with values at once, as it takes no longer.
_MADE_AT_ONCE = 40_000_000
_FACTORS_TRIED = 4
# How far values of one dimension, such as biases and scales, are moved from where they begin.
_MOVED = 0.1

MakePlan = Callable[[Description], Plan]


@dataclass(frozen=True, slots=True)
class Twin:
    """``description`` is of a small model, which takes ``inputs``; its ``plan`` has the form of the
    large model's. ``runs`` are its own, which it has begun."""

    description: Description
    plan: Plan
    inputs: Inputs
    runs: Runs


def find_twin(
    description: Description, plan: Plan, make_plan: MakePlan, device: torch.device
) -> Twin | None:
    """The twin of a model with this plan, the same on every rank, or None where there is none: it
    is not made of a configuration alone, or was changed since, no small one has such a plan, or
    what it takes is not known."""
    model = description.modules[""]
    if not is_configured(model):
        return None
    with seeded():
        found = _with_few_layers(model)
        if found is None:
            return None
        config, elements = found
        ranks = plan.ranks
        for factor in (*factors(config, ranks=ranks)[:_FACTORS_TRIED], 1):
            small = narrowed(config, factor, ranks=ranks)
            at_once = elements // factor <= _MADE_AT_ONCE
            sketch = _sketch(model, small, device="cpu" if at_once else "meta")
            if sketch is None or _elements(sketch) > _LARGEST:
                continue
            if _planned(describe(sketch), plan, make_plan) is not None:
                twin = sketch if at_once else _sketch(model, small, device="cpu")
                return _made(twin, model, plan, make_plan, device)
    return None


def _elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _with_few_layers(model: nn.Module) -> tuple[Any, int] | None:
    """The configuration with the first layers, of which the model has no others, and the number of
    elements that these have; None where the model is not what its configuration says."""
    expected = _shapes(model)
    for layers in layers_to_try(model, _MOST_LAYERS):
        config = with_layers(model, layers)
        small = _sketch(model, config)
        if small is None:
            return None
        if _shapes(small) == expected:
            return config, _elements(small)
    return None


def _sketch(model: nn.Module, config: Any, *, device: str = "meta") -> nn.Module | None:
    """A small model, or None for a configuration that its class does not take."""
    try:
        return small_model(model, config, device=device)
    except Exception:  # whatever a class raises for what it does not take
        return None


def _shapes(model: nn.Module) -> set[tuple[str, object]]:
    """What there is by its name without indices: classes, functions and hooks that modules have of
    their own, parameters."""
    found: set[tuple[str, object]] = set()
    for name, module in model.named_modules():
        own = frozenset(key for key, value in vars(module).items() if callable(value))
        found.add((index_pattern(name), (type(module), own, is_hooked(module))))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.add((index_pattern(name), full_shape(parameter)))
    return found


def _planned(description: Description, plan: Plan, make_plan: MakePlan) -> Plan | None:
    """The plan of a small model, if it has the form of ``plan``."""
    try:
        own = make_plan(description)
    except ValueError:
        return None
    return None if plan.form_difference(own) else own


def _made(
    twin: nn.Module | None,
    model: nn.Module,
    plan: Plan,
    make_plan: MakePlan,
    device: torch.device,
) -> Twin | None:
    """The twin, if it runs; it has its values."""
    if twin is None:
        return None
    _prepare(twin, model)
    description = describe(twin.to(device))
    own = _planned(description, plan, make_plan)
    values = token_inputs(twin, device=device)
    if own is None or values is None:
        return None
    inputs = Inputs(values, with_labels(twin, values), insist=True)
    runs = Runs(description, own)
    with isolated(twin, device):
        return Twin(description, own, inputs, runs) if runs.can_run(inputs) else None


@torch.no_grad()
def _prepare(twin: nn.Module, model: nn.Module) -> None:
    """Biases that are not 0 and scales that are not 1; and gradients where the model has them."""
    trains: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        pattern = index_pattern(name)
        trains[pattern] = trains.get(pattern, False) or parameter.requires_grad
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(trains.get(index_pattern(name), True))
        if parameter.dim() == 1:
            parameter.add_(torch.randn(parameter.shape), alpha=_MOVED)
