# SPDX-License-Identifier: Apache-2.0
"""Thousands of steps in bfloat16 with dropout, clipping and AdamW let no ranks drift apart, and the
losses are those of one process.

``make drift`` takes 5,000 steps at TP 4, each way over sockets and in shared memory, and prints how
far the curves are apart; about an hour on two quiet cores.
"""

import os

import pytest

from tests.distributed import drift_ranks
from tests.distributed.drift_ranks import Run
from tests.support.worker_pool import Pool

IS_LONG = bool(os.environ.get("AUTOTP_DRIFT"))
STEPS, EVERY, WINDOW = (5000, 500, 500) if IS_LONG else (16, 8, 8)
TIMEOUT = 7200 if IS_LONG else 60
ORDERS = (1, 2, 3) if IS_LONG else (1,)
# AUTOTP_SHARED_MEMORY of the runs of each way.
WAYS = {"parallelize": ["0", "1"], "initialize": ["1", "0"]}


def windows(losses: list[float]) -> list[float]:
    """Means of so many steps each."""
    return [sum(losses[at : at + WINDOW]) / WINDOW for at in range(0, len(losses), WINDOW)]


def apart(losses: list[float], expected: list[float]) -> float:
    """The largest relative difference of two curves, by their windows."""
    pairs = zip(windows(losses), windows(expected), strict=True)
    return max(abs(one - other) / other for one, other in pairs)


@pytest.mark.parametrize("way", WAYS)
def test_a_long_run_lets_no_replica_drift(pool: Pool, way: str) -> None:
    run = Run(way, STEPS, EVERY)
    (one,) = pool.run(drift_ranks.train, run, ranks=1, timeout=TIMEOUT)
    others = [Run(way, STEPS, EVERY, order=order) for order in ORDERS]
    orders = [pool.run(drift_ranks.train, each, ranks=1, timeout=TIMEOUT)[0] for each in others]
    spread = max(apart(each.losses, one.losses) for each in orders)
    for shared_memory in WAYS[way][: 2 if IS_LONG else 1]:
        env = {"AUTOTP_SHARED_MEMORY": shared_memory}
        found = pool.run(drift_ranks.train, run, ranks=4, timeout=TIMEOUT, env=env)
        for each in found:
            assert each.differing == {step: [] for step in range(EVERY, STEPS + 1, EVERY)}
            assert each.losses == found[0].losses
        difference = apart(found[0].losses, one.losses)
        print(
            f"\n{way}, shared memory {shared_memory}: {difference:.1e} from one process, whose"
            f" orders of sums are {spread:.1e} apart; {windows(found[0].losses)[-1]:.4f} in the end"
        )
        # In a few steps only rounding differs; in thousands the runs go ways of their own.
        assert difference < 3 * spread + (2e-3 if IS_LONG else 2e-4)


def test_replicas_are_seen_to_drift_where_their_products_differ(pool: Pool) -> None:
    run = Run("parallelize", 4, 2, rounds_otherwise=True)
    for each in pool.run(drift_ranks.train, run):
        assert list(each.differing) == [2, 4]
        assert all(any("mlp" in name for name in names) for names in each.differing.values())
