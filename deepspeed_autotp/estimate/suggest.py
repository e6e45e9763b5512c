# SPDX-License-Identifier: Apache-2.0
"""Which TP, data-parallel and ZeRO sizes fit into the memory of some GPUs, the best first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from deepspeed_autotp import _core
from deepspeed_autotp.estimate.estimator import Estimator, Request
from deepspeed_autotp.estimate.report import Estimate, Layout, Suggestion

_STAGES = (0, 1, 2, 3)


def suggest(
    estimator: Estimator, request: Request, *, model: str, gpus: int, memory: int, most_ranks: int
) -> Suggestion:
    """Layouts of ``gpus`` GPUs with ``memory`` bytes each, TP sizes up to ``most_ranks``.

    ``request`` gives all but the number of data-parallel ranks and the stage; it has a bandwidth.
    The core orders what the estimates say (csrc/core/cost/layouts.h).
    """
    notes: list[str] = []
    estimates = list(_estimates(estimator, request, gpus, most_ranks, notes))
    candidates = [
        (e.tp_size, e.settings.replicas, e.settings.zero_stage, _peak(e), _seconds(e))
        for e in estimates
    ]
    layouts = [
        Layout(*candidates[index], fits=fits, reason=reason)
        for index, fits, reason in _core.order_layouts(candidates, memory)
    ]
    assert request.bandwidth is not None
    return Suggestion(model, gpus, memory, request.bandwidth, tuple(layouts), tuple(notes))


def _estimates(
    estimator: Estimator, request: Request, gpus: int, most_ranks: int, notes: list[str]
) -> Iterator[Estimate]:
    for ranks in range(1, min(gpus, most_ranks) + 1):
        if gpus % ranks:
            continue
        replicas = gpus // ranks
        for stage in _STAGES if replicas > 1 else _STAGES[:2]:
            wanted = replace(request, replicas=replicas, stage=stage)
            try:
                found = estimator.estimate(ranks, wanted)
            except ValueError as error:
                notes.append(f"TP size {ranks} is left out: {error}")
                break
            if found.activations.source == "formula" and stage == 0:
                why = found.activations.reason
                notes.append(f"TP size {ranks} has no communication of its own counted: {why}")
            yield found


def _peak(estimate: Estimate) -> int:
    return max(rank.peak for rank in estimate.ranks)


def _seconds(estimate: Estimate) -> float:
    return sum(each.seconds or 0.0 for each in estimate.collectives)
