# SPDX-License-Identifier: Apache-2.0
"""Options beside tensor parallelism: as in a run without it, or an error before training.

``make loops`` runs the whole table of tests/support/options_table.py.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import pytest

from tests.integration import options_ranks
from tests.support.options import REFUSED, Option
from tests.support.options_table import TABLE
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool

ALL = bool(os.environ.get("AUTOTP_LOOPS"))
# What one case runs in one process after the other.
CASES = {option.name: [option] for option in TABLE if option.runs} if ALL else {}
CASES["some of each kind"] = [option for option in TABLE if option.fast]
# How far losses and norms may be: in float32, and with weights in 16 bits.
NEAR, ROUNDED = 3e-4, 5e-3


def numbers_apart(got: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """How far losses and gradient norms are from the expected ones."""
    pairs = [
        (mine, theirs)
        for key in ("losses", "norms")
        for mine, theirs in zip(got[key], expected[key], strict=True)
        if theirs or key == "losses"  # DeepSpeed has no norm with ZeRO 0 in float32
    ]
    # Equal ones may be infinite.
    return max(abs(a - b) / abs(b) if a != b else 0.0 for a, b in pairs)


def weights_apart(got: Mapping[str, Any], expected: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Of each weight how far it is from the expected one, and how far that moved."""
    found = []
    for name, before in expected["before"].items():
        after = expected["after"][name].float()
        apart = got["after"][name].float() - after
        found.append((float(apart.norm()), float((after - before).norm())))
    return found


def check(option: Option, stage: int | None, runs: list[dict[str, Any]], expected: Any) -> None:
    if option.outcome == REFUSED:
        text = same_error([run.get("error", "nothing") for run in runs])
        assert option.words in text
        assert {run["where"] for run in runs} == {"training" if stage is None else "before"}
        return
    assert not any("error" in run for run in [*runs, expected]), (runs[0], expected)
    assert all(run["losses"] == runs[0]["losses"] for run in runs)
    overflows = [math.isinf(norm) for norm in runs[0]["norms"]]
    assert overflows == [option.special == "overflows", False, False]
    rounded = option.bound > 10 * NEAR
    assert numbers_apart(runs[0], expected) < (ROUNDED if rounded else NEAR)
    found = weights_apart(runs[0], expected)
    if rounded:  # a weight near one does not move by a small step
        found = [(math.hypot(*(a for a, _ in found)), math.hypot(*(m for _, m in found)))]
    assert all(apart < option.bound * moved for apart, moved in found)


@pytest.mark.parametrize("name", CASES)
def test_an_option_changes_nothing_or_is_refused(pool: Pool, name: str) -> None:
    options = CASES[name]
    (replicas,) = {option.replicas for option in options}
    got = pool.run(options_ranks.run_all, options, 2, ranks=2 * replicas, timeout=110)
    trained = [option for option in options if option.outcome != REFUSED]
    expected: dict[Any, Any] = {}
    if trained:
        expected = pool.run(options_ranks.run_all, trained, 1, ranks=replicas, timeout=110)[0]
    for option in options:
        for stage in option.stages:
            runs = [rank[option.name, stage] for rank in got]
            check(option, stage, runs, expected.get((option.name, stage)))
