# SPDX-License-Identifier: Apache-2.0
"""What is done again and again takes no more memory, files, threads and groups each time.

``make leaks`` does it as often as LONG says, which memory needs to be judged, too, and prints what
grows; about an hour on two quiet cores.
"""

import os

import pytest

from tests.distributed import leaks_ranks
from tests.support.resource_samples import Sample, per_time, steady
from tests.support.worker_pool import Pool

IS_LONG = bool(os.environ.get("AUTOTP_LEAKS"))
LONG = {
    "steps": 10_000,
    "engine steps": 10_000,
    "models": 1000,
    "checked models": 100,
    "refusals": 1000,
    "failed steps": 1000,
    "gathers": 1000,
    "saves": 200,
    "checkpoints": 200,
    "engines": 200,
}
SHORT = {
    "steps": 24,
    "engine steps": 24,
    "models": 8,
    "refusals": 8,
    "failed steps": 8,
    "gathers": 8,
    "saves": 4,
}
WARM = 4
# malloc maps a region now and then; shared memory that stays mapped is one each time.
FEW = {"mapped regions": 0.05}
# Bytes of malloc and blocks of Python each time, in a long run. A tensor that a step leaves behind
# is some hundred bytes and more than one block; caches give up to 26 bytes and 0.01 blocks.
STEP = (64, 0.5)
# A model that is left behind keeps its weights, 300 KB, and thousands of blocks. Of the groups of
# each torch keeps 2 blocks, a tag and its list, and 1,400 bytes with the keys in a FileStore. Saves
# take 4,000 bytes while caches fill.
MODEL, SAVE = (4096, 4.0), (8192, 4.0)
MOST = dict.fromkeys(("steps", "engine steps", "failed steps", "gathers"), STEP) | {"saves": SAVE}


@pytest.mark.parametrize(("name", "times"), (LONG if IS_LONG else SHORT).items())
def test_nothing_is_left_behind(pool: Pool, name: str, times: int) -> None:
    warm = max(WARM, times // 10) if IS_LONG else WARM
    found = pool.run(leaks_ranks.repeat, name, times, warm, timeout=3600 if IS_LONG else 60)
    for rank, samples in enumerate(found):
        print(f"\n{name}, rank {rank}: {figures(samples)}")
        first, *_, last = samples
        grown = {
            what
            for what, count in last.counts.items()
            if count - first.counts[what] > FEW.get(what, 0) * times
        }
        assert not grown, (grown, first.counts, last.counts)
        if IS_LONG:
            malloc, blocks = MOST.get(name, MODEL)
            assert steady(samples, "malloc") < malloc
            assert steady(samples, "blocks") < blocks


def figures(samples: list[Sample]) -> str:
    first, *_, last = samples
    grown = {what: per_time(samples, what) for what in ("resident", "malloc", "blocks")}
    counts = {k: (n, last.counts[k]) for k, n in first.counts.items() if n != last.counts[k]}
    return (
        f"{last.times - first.times} times; each {grown['resident']:.0f} bytes resident, "
        f"{grown['malloc']:.1f} of malloc, {grown['blocks']:.2f} blocks; {counts or 'no counts'}"
    )
