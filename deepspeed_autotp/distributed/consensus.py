# SPDX-License-Identifier: Apache-2.0
"""Ranks that succeed together or fail together.

A rank that fails says so to the others, so that all raise the same error and none waits. An
exchange takes longer the more ranks there are: what a TP group does is agreed upon within it, and
:meth:`Agreement.conclude` tells all ranks of the run how it went, once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp.distributed.comparison import Compared
from deepspeed_autotp.distributed.failure_barrier import CollectiveMismatch, PeerFailed
from deepspeed_autotp.distributed.lost_ranks import LostRanks
from deepspeed_autotp.distributed.model_groups import world_cpu_group
from deepspeed_autotp.distributed.object_exchange import exchange_objects
from deepspeed_autotp.distributed.owned_groups import OwnedGroups
from deepspeed_autotp.distributed.process_group import TPGroup

T = TypeVar("T")

# What an agreement notes on the error that it raises: the failure of this rank, or None.
_SHARE = "_autotp_failure"


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What some work came to: its ``result``, what of it has to be ``compared`` with the other
    ranks, and what they are ``told``."""

    result: T
    compared: Sequence[Compared] = ()
    told: object = None


@dataclass(frozen=True, slots=True)
class _Failure:
    text: str
    is_user_error: bool  # a ValueError, TypeError or OSError: the user can correct it
    names_ranks: bool = False


class Agreement:
    """Exchanges Python objects, and broadcasts tensors, over the ranks of ``handle``.

    ``handle`` takes CPU tensors. ``is_first`` is true on one rank of the run, which warns for all.
    """

    def __init__(self, handle: dist.ProcessGroup, *, is_first: bool | None = None) -> None:
        self.ranks = tuple(dist.get_process_group_ranks(handle))
        self.is_first = dist.get_rank(handle) == 0 if is_first is None else is_first
        self._handle = handle
        self._lost = LostRanks.of(handle, "ranks that agree")

    def within(self, group: TPGroup) -> Agreement:
        """Agreement over the ranks of a TP group, which are some of these."""
        if self.ranks == group.global_ranks:
            return self
        return Agreement(group.cpu_handle, is_first=self.is_first)

    def exchange(self, mine: T) -> list[T]:
        """Every rank's ``mine``, in rank order. CollectiveMismatch on all ranks where some are at
        another exchange."""
        with self._lost:
            said = exchange_objects((_asking(), mine), self._handle)
        asking = [where for where, _ in said]
        if len(set(asking)) > 1:
            where = ", ".join(f"rank {r} in {at}" for r, at in zip(self.ranks, asking, strict=True))
            raise CollectiveMismatch(
                f"collective mismatch: the ranks agree on different things, {where}; every rank "
                "has to make the same calls of deepspeed_autotp, in one order"
            )
        return [each for _, each in said]

    def broadcast(self, tensor: Tensor, *, source: int) -> None:
        """Overwrite ``tensor``, on any device, with the value on global rank ``source``."""
        sent = tensor.detach().to("cpu").contiguous()
        with self._lost:
            dist.broadcast(sent.view(-1).view(torch.uint8), src=source, group=self._handle)
        tensor.detach().copy_(sent)

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank; where it raised on any rank, raise on all.

        All ranks raise one text: that of the lowest rank that failed, with the ranks named
        when only some failed. A RuntimeError keeps the failing rank's own exception as cause.
        """
        return self.conclude(lambda: Outcome(work()))[0]

    def conclude(self, work: Callable[[], Outcome[T]]) -> tuple[T, list[Any]]:
        """As :meth:`together`, and what each rank told. ValueError on all ranks where what has to
        be compared differs. One exchange, and another one where something differs.

        ``work`` may agree with some of the ranks. Where that fails, the error says here which
        ranks of all these have failed.
        """
        own: Exception | None = None
        failure: _Failure | None = None
        outcome: Outcome[T] | None = None
        try:
            outcome = work()
        except Exception as error:
            own, failure = error, _failure(error)
        digests = [] if outcome is None else [each.digest() for each in outcome.compared]
        told = None if outcome is None else outcome.told
        said = self.exchange((outcome is None, failure, digests, told))
        if outcome is None or any(has_failed for has_failed, *_ in said):
            raised = self._error([each for _, each, *_ in said])
            vars(raised)[_SHARE] = failure
            # An error of the user is complete in its message; one of ours needs its traceback.
            raise raised from (own if isinstance(raised, RuntimeError) else None)
        for index, mine in enumerate(outcome.compared):
            if len({theirs[index] for _, _, theirs, _ in said}) > 1:
                self._refuse_different(mine)
        return outcome.result, [each for *_, each in said]

    def _refuse_different(self, mine: Compared) -> None:
        text = mine.difference(self.exchange(mine.detail()), self.ranks)
        if text:
            raised = ValueError(text)
            vars(raised)[_SHARE] = _Failure(text, is_user_error=True, names_ranks=True)
            raise raised

    def _error(self, failures: Sequence[_Failure | None]) -> Exception:
        failed = [(r, f) for r, f in zip(self.ranks, failures, strict=True) if f is not None]
        if not failed:
            return RuntimeError("another rank failed, and its own error says why")
        _, failure = failed[0]
        text = failure.text
        if len(failed) < len(self.ranks) and not failure.names_ranks:
            names = ", ".join(str(rank) for rank, _ in failed)
            text = f"on rank {names} of {len(self.ranks)}: {text}"
        return ValueError(text) if failure.is_user_error else RuntimeError(text)


def world_agreement(owned: OwnedGroups) -> Agreement:
    """Agreement over all ranks of the default process group."""
    return Agreement(world_cpu_group(owned))


def _asking() -> str:
    """The function that wants to agree, the same on ranks that run the same code."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    if frame is None:
        return ""
    module = str(frame.f_globals.get("__name__", "")).removeprefix("deepspeed_autotp.")
    return f"{module}.{frame.f_code.co_name}"


def _failure(error: Exception) -> _Failure | None:
    """Why this rank raised ``error``; None where other ranks are the reason."""
    if isinstance(error, PeerFailed):
        return None
    if _SHARE in vars(error):
        share: _Failure | None = vars(error)[_SHARE]
        return share
    is_user_error = isinstance(error, (ValueError, TypeError, OSError))
    text = str(error) if is_user_error else f"{type(error).__name__}: {error}"
    return _Failure(text, is_user_error)
