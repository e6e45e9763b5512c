# SPDX-License-Identifier: Apache-2.0
"""Ranks that succeed together or fail together.

A rank that fails says so to the others, so that all raise the same error and none waits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from deepspeed_autotp._core import Plan
from deepspeed_autotp.distributed.process_group import cpu_group, supports_cpu_tensors

T = TypeVar("T")

# How many names or values an error lists.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class _Failure:
    text: str
    is_user_error: bool  # a ValueError, TypeError or OSError: the user can correct it


class Agreement:
    """Exchanges Python objects, not tensors, over the ranks of ``handle``."""

    def __init__(self, handle: dist.ProcessGroup) -> None:
        self._ranks = dist.get_process_group_ranks(handle)
        self._handle = handle if supports_cpu_tensors(handle) else cpu_group(self._ranks)
        self.is_first = dist.get_rank(handle) == 0

    def exchange(self, mine: T) -> list[T]:
        """Every rank's ``mine``, in rank order."""
        everyone = [mine] * len(self._ranks)
        dist.all_gather_object(everyone, mine, group=self._handle)
        return everyone

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank; where it raised on any rank, raise on all.

        All ranks raise one text: that of the lowest rank that failed, with the ranks named
        when only some failed. A RuntimeError keeps the failing rank's own exception as cause.
        """
        own: Exception | None = None
        result: T
        try:
            result = work()
        except Exception as error:
            own = error
        failures = self.exchange(None if own is None else _failure(own))
        failed = [(rank, failure) for rank, failure in enumerate(failures) if failure is not None]
        if not failed:
            return result
        raised = self._error(failed)
        # An error of the user is complete in its message; one of ours needs its traceback.
        raise raised from (own if isinstance(raised, RuntimeError) else None)

    def same(self, mine: Mapping[str, str], what: str) -> None:
        """ValueError on every rank, listing what differs, unless all ranks have equal values."""
        # The values may be a line for each module: they are exchanged only where digests differ.
        if len(set(self.exchange(_digest(f"{key}: {mine[key]}" for key in sorted(mine))))) == 1:
            return
        everyone = self.exchange(dict(mine))
        keys = dict.fromkeys(key for values in everyone for key in values)
        lines = []
        for key in keys:
            holders: dict[str, list[int]] = {}
            for rank, values in zip(self._ranks, everyone, strict=True):
                holders.setdefault(values.get(key, "missing"), []).append(rank)
            if len(holders) > 1:
                lines.append(f"{key}: {_by_rank(holders)}")
        if lines:
            raise ValueError(
                "\n  - ".join([f"{what} differs between the ranks:", *lines])
                + "\nGive every rank the same values."
            )

    def same_plan(self, plan: Plan, traits: Sequence[str]) -> None:
        """ValueError on every rank unless all ranks made the same plan.

        ``traits[i]`` describes what else has to be equal of the parameter of entry ``i``.
        """
        if len(set(self.exchange((plan.hash, _digest(traits))))) == 1:
            return
        first, *others = self.exchange(_lines(plan, traits))
        for rank, theirs in zip(self._ranks[1:], others, strict=True):
            if theirs != first:
                raise ValueError(_different(first, theirs, ranks=(self._ranks[0], rank)))
        raise AssertionError("the hashes of equal plans differ")

    def _error(self, failed: list[tuple[int, _Failure]]) -> Exception:
        rank, failure = failed[0]
        text = failure.text
        if len(failed) < len(self._ranks):
            names = ", ".join(str(self._ranks[rank]) for rank, _ in failed)
            text = f"on rank {names} of {len(self._ranks)}: {text}"
        return ValueError(text) if failure.is_user_error else RuntimeError(text)


def world_agreement() -> Agreement:
    """Agreement over all ranks of the default process group."""
    assert dist.group.WORLD is not None
    return Agreement(dist.group.WORLD)


def _digest(lines: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _failure(error: Exception) -> _Failure:
    is_user_error = isinstance(error, (ValueError, TypeError, OSError))
    text = str(error) if is_user_error else f"{type(error).__name__}: {error}"
    return _Failure(text, is_user_error)


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
            f"gather_scatter={stack.gather_scatter}"
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
