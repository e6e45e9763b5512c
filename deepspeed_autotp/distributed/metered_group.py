# SPDX-License-Identifier: Apache-2.0
"""A tensor-parallel group that measures its collectives, in the place of one that does not.

Under torch.compile collectives are part of the graph, and are not measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp.distributed.lost_ranks import Work
from deepspeed_autotp.distributed.model_groups import Subgroups
from deepspeed_autotp.distributed.process_group import TPGroup


@dataclass(frozen=True, slots=True)
class Collectives:
    """Of some time: ``nbytes`` that this rank gave to collectives, the ``seconds`` that it spent in
    them, and those that went by, ``elapsed``."""

    nbytes: int
    seconds: float
    elapsed: float


class CollectiveMeter:
    """Counts until it is asked. The clock is that of the CPU, or for tensors on a GPU that of its
    current stream: what a collective hides behind other work on the stream is not counted."""

    def __init__(self) -> None:
        self._nbytes = 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._since = time.perf_counter()

    @contextmanager
    def measured(self, x: Tensor, *, nbytes: int) -> Iterator[None]:
        """What is within is a collective of ``x``, or a part of one: ``nbytes`` are counted."""
        self._nbytes += nbytes
        if x.is_cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((first, last))
            return
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def take(self) -> Collectives:
        """What there was since the last call. Waits for a GPU."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        now = time.perf_counter()
        found = Collectives(self._nbytes, self._seconds, now - self._since)
        self._nbytes, self._seconds, self._since = 0, 0.0, now
        self._events.clear()
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _MeteredWork:
    """A collective that was started, of which the wait is measured."""

    work: Work
    x: Tensor
    meter: CollectiveMeter

    def wait(self) -> object:
        with self.meter.measured(self.x, nbytes=0):
            return self.work.wait()


class MeteredGroup(TPGroup):
    """A group with a ``meter``, which knows every collective of its own."""

    def __init__(self, handle: dist.ProcessGroup) -> None:
        super().__init__(handle)
        self.meter = CollectiveMeter()

    def all_reduce(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().all_reduce(x)
        with self.meter.measured(x, nbytes=x.nbytes):
            return super().all_reduce(x)

    def start_all_reduce(self, x: Tensor) -> Work:
        with self.meter.measured(x, nbytes=x.nbytes):
            work = super().start_all_reduce(x)
        return _MeteredWork(work, x, self.meter)

    def all_gather_into(self, x: Tensor, *, into: Tensor, of_any_pass: bool = False) -> None:
        with self.meter.measured(x, nbytes=x.nbytes):
            super().all_gather_into(x, into=into, of_any_pass=of_any_pass)

    def start_reduce_scatter(self, x: Tensor, widths: Sequence[int]) -> tuple[Work, Tensor]:
        with self.meter.measured(x, nbytes=x.nbytes):
            work, own = super().start_reduce_scatter(x, widths)
        return _MeteredWork(work, x, self.meter), own

    def all_reduce_in(self, subgroups: Subgroups, x: Tensor) -> Tensor:
        with self.meter.measured(x, nbytes=x.nbytes):
            return super().all_reduce_in(subgroups, x)
