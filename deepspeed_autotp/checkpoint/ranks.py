# SPDX-License-Identifier: Apache-2.0
"""All ranks of a run while they save together; also where there is one process without a group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp.distributed.comparison import Values
from deepspeed_autotp.distributed.consensus import Agreement, Outcome, world_agreement
from deepspeed_autotp.distributed.lost_ranks import reason_of
from deepspeed_autotp.distributed.owned_groups import OwnedGroups

T = TypeVar("T")


class Ranks:
    """``is_first`` is true on global rank 0."""

    def __init__(self, agreement: Agreement | None) -> None:
        self._agreement = agreement
        self.is_first = agreement is None or dist.get_rank() == 0

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank; where it raised on any rank, raise on all."""
        return work() if self._agreement is None else self._agreement.together(work)

    def on_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on global rank 0; what it returned, or raised, on every rank."""
        if self._agreement is None:
            return work()
        _, told = self._agreement.conclude(
            lambda: Outcome(None, told=work() if self.is_first else None)
        )
        first: T = told[0]
        return first

    def broadcast(self, tensor: Tensor, *, source: int) -> None:
        """Overwrite ``tensor`` with the value on global rank ``source``."""
        if self._agreement is not None:
            self._agreement.broadcast(tensor, source=source)

    def compare(self, values: Mapping[str, str], what: str) -> None:
        """ValueError on every rank where ``values`` are not the same on all of them."""
        if self._agreement is not None:
            self._agreement.conclude(lambda: Outcome(None, compared=[Values(values, what)]))


@contextmanager
def ranks_of_run(caller: str) -> Iterator[Ranks]:
    """All ranks of the run, which have to call ``caller``; RuntimeError where one does not within
    the timeout of the process group."""
    if not dist.is_initialized():
        yield Ranks(None)
        return
    with closing(OwnedGroups()) as owned:
        try:
            agreement = world_agreement(owned)
            agreement.exchange(caller)
        except RuntimeError as error:
            raise RuntimeError(
                f"{caller}: some rank did not call it within the timeout of the process group, "
                f"expected a call on all {dist.get_world_size()} ranks of the run; call it on "
                f"every rank: {reason_of(error)}"
            ) from error
        yield Ranks(agreement)
