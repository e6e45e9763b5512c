# SPDX-License-Identifier: Apache-2.0
"""From what the ranks of benchmarks/step.py report to one row for each way."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.step_calls import Call
from benchmarks.step_rank import PHASES, Inspected, Measured, Times


@dataclass(frozen=True, slots=True)
class Traffic:
    """Collectives of TP rank 0 in one phase: calls by kind, and the bytes given to them."""

    calls: Mapping[str, int]
    size: int

    def minus(self, other: Traffic) -> Traffic:
        kinds = self.calls.keys() | other.calls.keys()
        less = {kind: self.calls.get(kind, 0) - other.calls.get(kind, 0) for kind in kinds}
        return Traffic({kind: n for kind, n in less.items() if n}, self.size - other.size)


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of a way: losses of the first steps, and medians over the timed steps;
    ``over_bare`` is that of the ratios of a step to the one without collectives right after it.
    ``processor`` and ``processor_over_bare`` are the same for the seconds of processors, which are
    those of all ranks together."""

    losses: list[float]
    seconds: float
    bare: float
    over_bare: float
    processor: float
    processor_over_bare: float

    @classmethod
    def of(cls, ranks: Sequence[Measured]) -> Round:
        """A step has ended when it has on every rank."""
        steps = list(zip(*(rank.steps for rank in ranks), strict=True))
        without = list(zip(*(rank.bare for rank in ranks), strict=True))
        seconds, bare = _slowest(steps), _slowest(without)
        worked, bare_worked = _work(steps), _work(without)
        return cls(
            ranks[0].losses,
            seconds=statistics.median(seconds),
            bare=statistics.median(bare),
            over_bare=_ratio(seconds, bare),
            processor=statistics.median(worked),
            processor_over_bare=_ratio(worked, bare_worked),
        )


def _slowest(steps: Sequence[Sequence[Times]]) -> list[float]:
    return [max(rank.seconds for rank in step) for step in steps]


def _work(steps: Sequence[Sequence[Times]]) -> list[float]:
    return [sum(rank.processor for rank in step) for step in steps]


def _ratio(steps: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(steps, others, strict=True))


@dataclass(frozen=True, slots=True)
class Row:
    """One way at one length of sequence.

    step, layer   traffic between ranks by phase: of a step, and of one decoder layer
    alone         calls of a step over groups that have one rank, which carry nothing
    transports    what carried the calls
    seconds       of a step; ``bare`` without collectives; medians over the rounds
    over_first    seconds over those of the first way
    over_bare     seconds over those without collectives, step by step
    processor...  the same for the seconds of processors, of all ranks together
    held, peak    bytes of the parameters and of all that is alive during a step, on the rank
                  that needs most
    """

    way: str
    sequence: int
    losses: list[float]
    loss_difference: float
    step: Mapping[str, Traffic]
    layer: Mapping[str, Traffic]
    alone: int
    transports: list[str]
    seconds: float
    bare: float
    over_first: float
    over_bare: float
    processor: float
    processor_over_first: float
    processor_over_bare: float
    held: int
    peak: int


def row_of(
    way: str,
    sequence: int,
    model: Sequence[Inspected],
    deeper: Sequence[Inspected],
    rounds: Sequence[Mapping[str, Round]],
    *,
    first: str,
) -> Row:
    """``model`` and ``deeper`` are by rank; the latter has one decoder layer more."""
    calls = [call for phase in PHASES for call in model[0].calls[phase]]
    step = {phase: _traffic(model[0].calls[phase]) for phase in PHASES}
    more = {phase: _traffic(deeper[0].calls[phase]) for phase in PHASES}
    own = [each[way] for each in rounds]
    return Row(
        way=way,
        sequence=sequence,
        losses=own[0].losses,
        loss_difference=max(_difference(each[way], each[first]) for each in rounds),
        step=step,
        layer={phase: more[phase].minus(step[phase]) for phase in PHASES},
        alone=sum(call.ranks == 1 for call in calls),
        transports=sorted({call.transport for call in calls}),
        seconds=statistics.median(each.seconds for each in own),
        bare=statistics.median(each.bare for each in own),
        over_first=statistics.median(each[way].seconds / each[first].seconds for each in rounds),
        over_bare=statistics.median(each.over_bare for each in own),
        processor=statistics.median(each.processor for each in own),
        processor_over_first=statistics.median(
            each[way].processor / each[first].processor for each in rounds
        ),
        processor_over_bare=statistics.median(each.processor_over_bare for each in own),
        held=max(rank.held for rank in model),
        peak=max(rank.peak for rank in model),
    )


def worst_loss(rows: Sequence[Row]) -> float:
    """The largest relative difference of a loss to that of the first way."""
    return max(row.loss_difference for row in rows)


def _traffic(calls: Sequence[Call]) -> Traffic:
    between = [call for call in calls if call.ranks > 1]
    calls_by_kind = dict(Counter(call.kind for call in between))
    return Traffic(calls_by_kind, sum(call.size for call in between))


def _difference(own: Round, first: Round) -> float:
    pairs = zip(own.losses, first.losses, strict=True)
    relative = [abs(a - b) / abs(b) for a, b in pairs]
    return math.inf if any(map(math.isnan, relative)) else max(relative)
