# SPDX-License-Identifier: Apache-2.0
"""The error of a collective whose other ranks are gone, in the words of the run.

torch's own names an address, and neither the ranks that were waited for nor what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

import torch.distributed as dist

from deepspeed_autotp.distributed.model_groups import group_timeout
from deepspeed_autotp.interop.torch_private import is_lost_connection

# How errors of csrc/shared_memory/wait.c begin where a rank is gone or too late.
_NO_ANSWER = "no answer in shared memory"
# How many ranks an error lists.
_NAMED = 8


class Work(Protocol):
    """A collective that was started, as torch.distributed.Work."""

    def wait(self) -> object: ...


class RanksLost(RuntimeError):
    """A collective failed as a rank, or the network to it, is gone; ``reason`` is torch's."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def reason_of(error: BaseException) -> str:
    """What torch says of a collective that failed, in a line."""
    return error.reason if isinstance(error, RanksLost) else str(error).partition("\n")[0]


@dataclass(slots=True)
class LostRanks:
    """A context of collectives of ``what`` over ``ranks``, which raise :class:`RanksLost`.

    ``hosts`` are names by rank, of those that are known; ``seconds`` is the timeout.
    """

    what: str
    rank: int
    ranks: Sequence[int]
    seconds: float | None
    hosts: Mapping[int, str] = field(default_factory=dict)

    @staticmethod
    def of(handle: dist.ProcessGroup, what: str) -> LostRanks:
        """Those of a process group, which an error calls ``what``."""
        timeout = group_timeout(handle)
        return LostRanks(
            what,
            dist.get_rank(),
            dist.get_process_group_ranks(handle),
            None if timeout is None else timeout.total_seconds(),
        )

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, RanksLost):
            return
        if not is_lost_connection(error) and not str(error).startswith(_NO_ANSWER):
            return
        reason = reason_of(error)
        raise RanksLost(f"{self._said()}: {reason}", reason) from None

    def watch(self, work: Work) -> Work:
        """``work``, whose wait raises the same error."""
        return _WatchedWork(work, self)

    def _said(self) -> str:
        others = [rank for rank in self.ranks if rank != self.rank]
        dots = ", ..." if len(others) > _NAMED else ""
        seconds = "" if self.seconds is None else f" of {self.seconds:g} s"
        return (
            f"a collective of {self.what} failed on {self._named(self.rank)}, with "
            f"{', '.join(self._named(rank) for rank in others[:_NAMED])}{dots}: one of them or its "
            f"host has ended, or did not answer within the timeout{seconds}; look at its own error "
            "and at the network, and start all ranks again from the last checkpoint"
        )

    def _named(self, rank: int) -> str:
        host = self.hosts.get(rank)
        return f"rank {rank}" + (f" on {host}" if host else "")


@dataclass(frozen=True, slots=True, eq=False)
class _WatchedWork:
    work: Work
    lost: LostRanks

    def wait(self) -> object:
        with self.lost:
            return self.work.wait()
