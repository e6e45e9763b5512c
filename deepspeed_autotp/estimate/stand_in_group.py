# SPDX-License-Identifier: Apache-2.0
"""A TP group of one process that plays one rank of many: what is sent is counted, and goes nowhere.

A sum leaves a tensor as it is, and a gather leaves its output empty: with fake tensors only sizes
matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deepspeed_autotp.distributed.model_groups import Subgroups
from deepspeed_autotp.distributed.process_group import TPGroup

# The kind of a collective, as the core names it, the bytes that this rank gives to it, and the
# ranks that take part.
Sent = Callable[[str, int, int], None]


class _Done:
    """A collective that has completed."""

    def wait(self) -> None:
        return None


class StandInGroup(TPGroup):
    """Rank ``rank`` of ``size`` ranks that are not there. ``sent`` is told of each collective."""

    def __init__(self, rank: int, size: int, sent: Sent) -> None:
        self.rank = rank
        self.size = size
        self.global_ranks = tuple(range(size))
        self.before_collective = None
        self._sent = sent
        self._memory = None
        self._is_sharing_memory = False

    def open_subgroups(self, wanted: Sequence[Subgroups]) -> None:
        """Nothing has to be made."""

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._sent("all-reduce", x.nbytes, self.size)
        return x

    def start_all_reduce(self, x: Tensor) -> _Done:
        self._sent("all-reduce", x.nbytes, self.size)
        return _Done()

    def all_gather_into(self, x: Tensor, *, into: Tensor, of_any_pass: bool = False) -> None:
        self._sent("all-gather", x.nbytes, self.size)

    def start_reduce_scatter(self, x: Tensor, widths: Sequence[int]) -> tuple[_Done, Tensor]:
        self._sent("reduce-scatter", x.nbytes, self.size)
        return _Done(), x.new_empty(widths[self.rank], *x.shape[1:])

    def broadcast(self, x: Tensor, *, via: torch.device | None = None) -> None:
        self._sent("broadcast", x.nbytes, self.size)

    def all_reduce_in(self, subgroups: Subgroups, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._sent("all-reduce", x.nbytes, subgroups[self.rank][1])
        return x
