# SPDX-License-Identifier: Apache-2.0
"""Ranks that succeed together or fail together.

A rank that fails says so to the others, so that all raise the same error and none waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from deepspeed_autotp._core import Plan
from deepspeed_autotp.group import host_group, moves_host_tensors

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Failure:
    text: str
    is_users: bool  # a ValueError or TypeError: the user's to mend


class Agreement:
    """Exchanges words, not tensors, over the ranks of ``handle``."""

    def __init__(self, handle: dist.ProcessGroup) -> None:
        self._ranks = dist.get_process_group_ranks(handle)
        self._handle = handle if moves_host_tensors(handle) else host_group(self._ranks)
        self.rank = dist.get_rank(handle)

    def exchange(self, mine: T) -> list[T]:
        """Every rank's ``mine``, in rank order."""
        everyone = [mine] * len(self._ranks)
        dist.all_gather_object(everyone, mine, group=self._handle)
        return everyone

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank; where it raised on any rank, raise on all.

        All ranks raise one text: that of the lowest rank that failed, with the ranks named
        when only some failed. A failing rank keeps its own exception as the cause.
        """
        own: Exception | None = None
        result: T
        try:
            result = work()
        except Exception as error:
            own = error
        said = self.exchange(None if own is None else _failure(own))
        failed = [(rank, failure) for rank, failure in enumerate(said) if failure is not None]
        if not failed:
            return result
        raise self._error(failed) from own

    def same_plan(self, plan: Plan) -> None:
        """ValueError on every rank unless all ranks made the same plan."""
        if len(set(self.exchange(plan.hash))) == 1:
            return
        lines = [
            f"{e.name} {e.kind} {list(e.shape)} {[e.runs(r) for r in range(plan.ranks)]}"
            for e in plan.entries
        ]
        everyone = self.exchange(lines)
        for other, theirs in enumerate(everyone):
            for first, line in zip(everyone[0], theirs, strict=False):
                if first != line:
                    raise ValueError(_different(other, first, line))
            if len(theirs) != len(everyone[0]):
                raise ValueError(
                    f"the ranks hold different models: rank 0 has {len(everyone[0])} parameters, "
                    f"rank {other} has {len(theirs)}. Build the same model on every rank."
                )
        raise ValueError("the ranks made different plans; give every rank the same configuration")

    def _error(self, failed: list[tuple[int, _Failure]]) -> Exception:
        rank, failure = failed[0]
        text = failure.text
        if len(failed) < len(self._ranks):
            names = ", ".join(str(self._ranks[rank]) for rank, _ in failed)
            text = f"on rank {names} of {len(self._ranks)}: {text}"
        return ValueError(text) if failure.is_users else RuntimeError(text)


def _failure(error: Exception) -> _Failure:
    users = isinstance(error, (ValueError, TypeError, OSError))
    return _Failure(str(error) if users else f"{type(error).__name__}: {error}", users)


def _different(other: int, first: str, line: str) -> str:
    return (
        f"rank 0 and rank {other} made different plans. First difference:\n"
        f"  rank 0: {first}\n  rank {other}: {line}\n"
        "Build the same model and give the same configuration on every rank."
    )
