# SPDX-License-Identifier: Apache-2.0
"""What has to be the same on every rank, and how it differs where it is not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from deepspeed_autotp._core import Plan

# How many names or values an error lists.
_NAMED = 3


class Compared(Protocol):
    """A value that has to be the same on every rank."""

    def digest(self) -> str:
        """Equal for equal values only."""

    def detail(self) -> object:
        """What the ranks tell each other where the digests differ."""

    def difference(self, everyone: Sequence[Any], ranks: Sequence[int]) -> str:
        """For an error: how the details of ``ranks`` differ; empty where they are equal."""


class Values:
    """Values by their name; ``what`` they are, for an error."""

    def __init__(self, mine: Mapping[str, str], what: str) -> None:
        self._mine = dict(mine)
        self._what = what

    def digest(self) -> str:
        # The values may be a line for each module.
        return _digest(f"{key}: {self._mine[key]}" for key in sorted(self._mine))

    def detail(self) -> dict[str, str]:
        return self._mine

    def difference(self, everyone: Sequence[dict[str, str]], ranks: Sequence[int]) -> str:
        keys = dict.fromkeys(key for values in everyone for key in values)
        lines = []
        for key in keys:
            holders: dict[str, list[int]] = {}
            for rank, values in zip(ranks, everyone, strict=True):
                holders.setdefault(values.get(key, "missing"), []).append(rank)
            if len(holders) > 1:
                lines.append(f"{key}: {_by_rank(holders)}")
        if not lines:
            return ""
        return (
            "\n  - ".join([f"{self._what} differs between the ranks:", *lines])
            + "\nGive every rank the same values."
        )


class Planned:
    """A plan; ``traits[i]`` is what else has to be equal of the parameter of entry ``i``."""

    def __init__(self, plan: Plan, traits: Sequence[str]) -> None:
        self._plan = plan
        self._traits = traits

    def digest(self) -> str:
        return f"{self._plan.hash} {_digest(self._traits)}"

    def detail(self) -> dict[str, str]:
        return _lines(self._plan, self._traits)

    def difference(self, everyone: Sequence[dict[str, str]], ranks: Sequence[int]) -> str:
        first, *others = everyone
        for rank, theirs in zip(ranks[1:], others, strict=True):
            if theirs != first:
                return _different(first, theirs, ranks=(ranks[0], rank))
        raise AssertionError("the hashes of equal plans differ")


def _digest(lines: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _by_rank(holders: Mapping[str, Sequence[int]]) -> str:
    """``2 on rank 0, but 4 on ranks 1, 2``."""
    phrases = []
    for value, ranks in holders.items():
        named = ", ".join(map(str, ranks[:_NAMED])) + (", ..." if len(ranks) > _NAMED else "")
        phrases.append(f"{value} on rank{'s' if len(ranks) > 1 else ''} {named}")
    return ", but ".join(phrases)


def _lines(plan: Plan, traits: Sequence[str]) -> dict[str, str]:
    """What a plan says of each parameter, layer, stack and integer, by its name."""
    lines = {
        entry.name: f"{entry.kind} {list(entry.shape)} {trait} "
        f"{[entry.runs(rank) for rank in range(plan.ranks)]}"
        + (f" tied to {plan.entries[entry.tied_to].name}" if entry.is_tied else "")
        for entry, trait in zip(plan.entries, traits, strict=True)
    }
    for layer in plan.layers:
        lines[f"{layer.module} (layer)"] = (
            f"{layer.kind} gather_output={layer.gather_output} split_input={layer.split_input} "
            f"divided={layer.divided} siblings={layer.siblings} features={layer.features}"
        )
    for number, stack in enumerate(plan.stacks):
        lines[f"stack {number}"] = (
            f"{stack.owner} layers={stack.layers} gather_input={stack.gather_input} "
            f"reduce_scatter_output={stack.reduce_scatter_output} "
            f"gather_scatter={stack.gather_scatter} norms={stack.norms}"
        )
    lines["the layer that keeps logits sharded"] = str(plan.logits_layer)
    for integer in plan.integers:
        lines[f"{integer.module}.{integer.key}"] = f"{integer.full} {integer.values}"
    return lines


def _different(
    first: Mapping[str, str], other: Mapping[str, str], *, ranks: tuple[int, int]
) -> str:
    lines = []
    for here, there, rank in ((first, other, ranks[0]), (other, first, ranks[1])):
        only = [name for name in here if name not in there]
        if only:
            more = f" and {len(only) - _NAMED} more" if len(only) > _NAMED else ""
            lines.append(f"only rank {rank} has {', '.join(only[:_NAMED])}{more}")
    if not lines:
        name = next(name for name in first if first[name] != other[name])
        lines = [f"{name} on rank {ranks[0]}: {first[name]}"]
        lines.append(f"{name} on rank {ranks[1]}: {other[name]}")
    return (
        "\n  - ".join(["the ranks made different plans:", *lines])
        + "\nBuild the same model and give the same configuration on every rank."
    )
