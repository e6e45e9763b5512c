# SPDX-License-Identifier: Apache-2.0
"""The same estimate at TP sizes side by side, and the memory of its largest rank by purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deepspeed_autotp.cli.page.gpus import GPUS
from deepspeed_autotp.estimate.estimator import Estimator, Request
from deepspeed_autotp.estimate.report import Estimate, RankMemory

_MOST = 8
# What the kinds of memory of a report are for.
PURPOSES: Mapping[str, tuple[str, ...]] = {
    "parameters": ("parameters", "gathered_parameters"),
    "gradients": ("gradients",),
    "optimizer": ("master_weights", "optimizer_states", "optimizer_step"),
    "activations": ("activations",),
    "buffers": ("communication_buffers",),
}


@dataclass(frozen=True, slots=True)
class TpSize:
    """One TP size: its estimate, or the reason why there is none.

    ``largest``  the rank that needs most
    ``moment``   when: "in_step" or "in_optimizer"
    ``peak``     what it needs then, by purpose
    ``most``     what it needs for each purpose at any moment
    """

    tp_size: int
    estimate: Estimate | None
    reason: str
    largest: RankMemory | None
    moment: str
    peak: Mapping[str, int]
    most: Mapping[str, int]

    def content(self) -> dict[str, Any]:
        """As the page has it in JSON."""
        if self.largest is None or self.estimate is None:
            return {"tp_size": self.tp_size, "reason": self.reason}
        activations = self.estimate.activations
        return {
            "tp_size": self.tp_size,
            "rank": self.largest.rank,
            "peak": self.largest.peak,
            "moment": self.moment,
            "at_the_peak": dict(self.peak),
            "most": dict(self.most),
            "activations": activations.source,
            "collectives": sum(each.count for each in self.estimate.collectives),
            "sent": sum(each.count * each.size for each in self.estimate.collectives),
            "seconds": seconds_of(self.estimate),
            "fits": {gpu.memory: gpu.verdict(self.largest.peak) for gpu in GPUS},
        }


def tp_sizes(
    estimator: Estimator, request: Request, done: Estimate, said: Callable[[int], None]
) -> tuple[TpSize, ...]:
    """TP sizes from 1 to 8, and that of ``done``, which is not estimated again.

    ``said`` is called with each size before it is estimated.
    """
    return tuple(
        _tp_size(estimator, size, request, done, said)
        for size in sorted({*range(1, _MOST + 1), done.tp_size})
    )


def _tp_size(
    estimator: Estimator,
    size: int,
    request: Request,
    done: Estimate,
    said: Callable[[int], None],
) -> TpSize:
    if size == done.tp_size:
        return of_estimate(done)
    said(size)
    try:
        return of_estimate(estimator.estimate(size, request))
    except ValueError as error:
        return TpSize(size, None, str(error), None, "", {}, {})


def of_estimate(estimate: Estimate) -> TpSize:
    largest = max(estimate.ranks, key=lambda rank: rank.peak)
    in_step = sum(largest.in_step.values()) >= sum(largest.in_optimizer.values())
    moments = (largest.in_step, largest.after_backward, largest.in_optimizer)
    purposes = [by_purpose(moment) for moment in moments]
    most = {name: max(each.get(name, 0) for each in purposes) for name in PURPOSES}
    # Where gradients are still few there are more activations than at the peak.
    most["activations"] = max(most["activations"], estimate.activations.peak)
    return TpSize(
        tp_size=estimate.tp_size,
        estimate=estimate,
        reason="",
        largest=largest,
        moment="in_step" if in_step else "in_optimizer",
        peak=purposes[0 if in_step else 2],
        most=most,
    )


def by_purpose(held: Mapping[str, int]) -> dict[str, int]:
    """Bytes for each of PURPOSES, and of further kinds under their own names."""
    found = dict.fromkeys(PURPOSES, 0)
    for kind, size in held.items():
        purpose = next((name for name, kinds in PURPOSES.items() if kind in kinds), kind)
        found[purpose] = found.get(purpose, 0) + size
    return found


def seconds_of(estimate: Estimate) -> float | None:
    """Of all collectives of a step; None without a bandwidth."""
    times = [each.seconds for each in estimate.collectives]
    known = [each for each in times if each is not None]
    return sum(known) if estimate.settings.bandwidth is not None else None
