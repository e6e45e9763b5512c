# SPDX-License-Identifier: Apache-2.0
"""What a process holds while it does one thing again and again."""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.held_memory import held
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
    marks = {warm + times * place // (SAMPLES - 1) for place in range(SAMPLES)}
    for number in range(warm + times):
        job(number)
        if number + 1 in marks:
            found.append(_sample(number + 1))
    return found


def per_time(samples: list[Sample], what: str) -> float:
    """By how much ``what`` grows each time: the least squares of the samples."""
    count = len(samples)
    mean = sum(each.times for each in samples) / count
    values = [getattr(each, what) for each in samples]
    spread = sum((each.times - mean) ** 2 for each in samples)
    pairs = zip(samples, values, strict=True)
    return sum((each.times - mean) * value for each, value in pairs) / spread


def _sample(times: int) -> Sample:
    for _ in range(3):  # finalizers of a collection leave something for the next
        gc.collect()
    counts = open_resources() | {
        "shared memory files": sum(name.startswith("autotp") for name in os.listdir("/dev/shm")),
        "mapped regions": len(Path("/proc/self/maps").read_text().splitlines()),
        "objects of the package": _own_objects(),
    }
    malloc, blocks = held()
    return Sample(times, counts, _resident(), malloc, blocks)


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
