# SPDX-License-Identifier: Apache-2.0
"""What a process holds while it does one thing again and again."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median_low

from tests.support.held_memory import held
from tests.support.memory_names import noting_memory
from tests.support.open_resources import open_resources

# The first of them once caches are warm.
SAMPLES = 5


@dataclass(frozen=True, slots=True)
class Sample:
    """After ``times`` of it. ``counts`` are of what is open and mapped, and of objects of ours,
    which may not grow; of memory caches take a little more now and then."""

    times: int
    counts: dict[str, int]
    resident: int  # bytes of memory of this process alone, in pages
    malloc: int  # bytes that malloc has given out
    blocks: int  # that Python's allocator has given out


def sampled(job: Callable[[int], object], *, times: int, warm: int) -> list[Sample]:
    """Do ``job(number)`` ``warm`` times, and ``times`` more; samples after the first, and spread
    over the others."""
    found = []
    names: set[str] = set()
    marks = {warm + times * place // (SAMPLES - 1) for place in range(SAMPLES)}
    with noting_memory(names.add):
        for number in range(warm + times):
            if number + 1 in marks:
                _collect()  # groups of dropped models are closed by a job that shards the next
            job(number)
            if number + 1 in marks:
                found.append(_sample(number + 1, names))
    return found


def per_time(samples: list[Sample], what: str) -> float:
    """By how much ``what`` grows each time: the least squares of the samples."""
    count = len(samples)
    mean = sum(each.times for each in samples) / count
    values = [getattr(each, what) for each in samples]
    spread = sum((each.times - mean) ** 2 for each in samples)
    pairs = zip(samples, values, strict=True)
    return sum((each.times - mean) * value for each, value in pairs) / spread


def steady(samples: list[Sample], what: str) -> float:
    """By how much ``what`` grows each time, in the half of the parts that grow least: a leak is in
    each of them, while a cache grows in one, by megabytes."""
    return median_low(per_time(list(part), what) for part in pairwise(samples))


def _sample(times: int, names: set[str]) -> Sample:
    """``names`` are of shared memory of this process; those without a file are forgotten."""
    names.intersection_update([name for name in names if Path(f"/dev/shm{name}").exists()])
    _collect()
    counts = open_resources() | {
        "shared memory files": len(names),
        "mapped regions": len(Path("/proc/self/maps").read_text().splitlines()),
        "objects of the package": _own_objects(),
    }
    malloc, blocks = held()
    return Sample(times, counts, _resident(), malloc, blocks)


def _collect() -> None:
    for _ in range(3):  # finalizers of a collection leave something for the next
        gc.collect()


def _own_objects() -> int:
    """Instances of classes of the package that the garbage collector knows."""
    return sum(
        str(type(each).__module__).startswith("deepspeed_autotp") for each in gc.get_objects()
    )


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")
