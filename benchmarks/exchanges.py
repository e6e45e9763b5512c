# SPDX-License-Identifier: Apache-2.0
"""What one exchange of objects between ranks costs: ``python -m benchmarks.exchanges 2 4 8 16``.

Local ranks exchange a record of the size that sharding exchanges, over gloo. Printed are the
median and the least milliseconds for each number of ranks, those of making and closing a gloo
group, and a line through them: ``fixed + per rank * ranks``.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_autotp.distributed.consensus import world_agreement
from deepspeed_autotp.distributed.owned_groups import OwnedGroups

EXCHANGES, GROUPS = 100, 10
# A failure, digests of five comparisons, a report and the names of a few groups.
RECORD = (False, None, ["0" * 32] * 5, ("cpu", 0, False, ["autotp/0/1/0"] * 4))


def main() -> None:
    sizes = [int(argument) for argument in sys.argv[1:]] or [2, 4, 8, 16]
    rows = [measured(ranks) for ranks in sizes]
    for kind in ("exchange", "group"):
        for ranks, row in zip(sizes, rows, strict=True):
            times = row[kind]
            print(f"{kind} {ranks:3} ranks {statistics.median(times):8.2f} {min(times):8.2f} ms")
        for name, of in (("median", statistics.median), ("least", min)):
            fixed, each = line(sizes, [of(row[kind]) for row in rows])
            print(f"{kind}, {name}: {fixed:.2f} ms + {each:.3f} ms * ranks")
            print(f"{kind}, {name}, 1,024 ranks: {fixed + 1024 * each:.0f} ms")


def measured(ranks: int) -> dict[str, list[float]]:
    """Milliseconds on rank 0, by what was done."""
    fork = multiprocessing.get_context("fork")  # each would import torch for seconds
    answer: Any = fork.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        processes = [
            fork.Process(target=_rank, args=(rank, ranks, store, answer)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        found: dict[str, list[float]] = answer.get()
        for process in processes:
            process.join()
    return found


def line(ranks: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """The straight line with the least squares: at no rank, and for each."""
    slope, intercept = statistics.linear_regression(ranks, times)
    return intercept, slope


def _rank(rank: int, ranks: int, store: str, answer: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    assert dist.group.WORLD is not None
    world = dist.group.WORLD
    agreement = world_agreement(OwnedGroups())

    def make_and_close() -> None:
        owned = OwnedGroups()
        owned.make(world, range(ranks), backend="gloo", timeout=None)
        dist.barrier()
        owned.close()

    found = {
        "exchange": _times(lambda: agreement.exchange(RECORD), EXCHANGES),
        "group": _times(make_and_close, GROUPS),
    }
    if rank == 0:
        answer.put(found)
    dist.barrier()
    dist.destroy_process_group()


def _times(work: Callable[[], object], count: int) -> list[float]:
    work()
    times = []
    for _ in range(count):
        dist.barrier()
        began = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - began))
    return times


if __name__ == "__main__":
    main()
