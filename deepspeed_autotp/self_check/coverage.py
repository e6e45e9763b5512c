# SPDX-License-Identifier: Apache-2.0
"""Layers that are sharded because of names or sizes and that no input of the self-check reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from deepspeed_autotp._core import Plan, Source, index_pattern
from deepspeed_autotp.self_check.compare import Difference

_NEVER = "no input of the self-check reached it"


def heuristic(plan: Plan) -> list[str]:
    """The layers that names or sizes alone shard, in a model of a type that was not tried."""
    return [layer.module for layer in plan.layers if layer.is_heuristic]


def large_layers(plan: Plan) -> list[str]:
    """The large layers that are sharded individually, because nothing else shards them."""
    return [layer.module for layer in plan.layers if layer.is_large]


def idle(plan: Plan, modules: Mapping[str, nn.Module], ran: Sequence[str]) -> list[str]:
    """Those of :func:`large_layers` that did not run, with ``*`` for each index. Some are used
    without being called, others only by inputs that the self-check does not know."""
    places = {_place(modules, name) for name in ran}
    never = [name for name in large_layers(plan) if _place(modules, name) not in places]
    return list(dict.fromkeys(map(index_pattern, never)))


def never_ran(
    plan: Plan, modules: Mapping[str, nn.Module], ran: Sequence[str], *, parts: Sequence[str]
) -> Difference | None:
    """The heuristic layers of which none in the same place of its classes ran, or None.

    ``parts`` names the modules for images, sound and the like: the self-check knows no input for
    them, and they stay replicated.
    """
    places = {_place(modules, name) for name in ran}
    never = [name for name in heuristic(plan) if _place(modules, name) not in places]
    for part in parts:
        within = [name for name in never if name.startswith(f"{part}.")]
        if within:
            return Difference(
                f"{_NEVER}; pass example_inputs that do to initialize or parallelize",
                _block(plan, part, within),
                replicate=True,
            )
    return Difference(_NEVER, tuple(dict.fromkeys(map(index_pattern, never)))) if never else None


def _place(
    modules: Mapping[str, nn.Module], name: str
) -> tuple[type[nn.Module], type[nn.Module], str]:
    """What layers with the same task have in common: not every expert is given tokens."""
    parent, _, leaf = name.rpartition(".")
    return type(modules[parent.rpartition(".")[0]]), type(modules[parent]), leaf


def _block(plan: Plan, part: str, within: Sequence[str]) -> tuple[str, ...]:
    """The part; or where a plan of its own shards some of it, the heuristic layers."""
    planned = (e for e in plan.entries if e.source is Source.TP_PLAN and e.is_sharded)
    if any(entry.name.startswith(f"{part}.") for entry in planned):
        return tuple(dict.fromkeys(map(index_pattern, within)))
    return (index_pattern(part),)
