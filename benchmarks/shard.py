# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of making a shard, against the torch expression it replaces.

Column shards take rows of a [features, features] weight, row shards take columns, fused ones take
this rank's share of each of three pieces. Both sides run alternately in one process; what counts
is the ratio of the medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deepspeed_autotp.native import packing


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    expression: str
    ours: Callable[[], Tensor]
    torch: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Figures:
    seconds: float  # median
    extra: int  # bytes of peak memory above what was held before, highest of all repeats


def column_case(weight: Tensor, *, ranks: int) -> Case:
    rows, columns = weight.shape
    width = rows // ranks
    runs = (rows - width, width)
    return Case(
        f"column, TP {ranks}",
        "chunk(dim 0).clone()",
        lambda: packing.pack(weight, view=(1, rows, columns), runs=runs, shape=(width, columns)),
        lambda: weight.chunk(ranks, 0)[-1].clone(),
    )


def row_case(weight: Tensor, *, ranks: int) -> Case:
    rows, columns = weight.shape
    width = columns // ranks
    runs = (columns - width, width)
    return Case(
        f"row, TP {ranks}",
        "chunk(dim 1).clone()",
        lambda: packing.pack(weight, view=(rows, columns, 1), runs=runs, shape=(rows, width)),
        lambda: weight.chunk(ranks, 1)[-1].clone(),
    )


def fused_case(weight: Tensor, *, ranks: int) -> Case:
    """Pieces of a half, a quarter and a quarter of the rows, as grouped-query q|k|v has them."""
    rows, columns = weight.shape
    pieces = ((0, rows // 2), (rows // 2, rows // 4), (rows // 4 * 3, rows // 4))
    spans = [(start + size - size // ranks, size // ranks) for start, size in pieces]
    shape = (sum(length for _, length in spans), columns)
    runs = [number for span in spans for number in span]
    return Case(
        f"fused, TP {ranks}",
        "cat of narrows",
        lambda: packing.pack(weight, view=(1, rows, columns), runs=runs, shape=shape),
        lambda: torch.cat([weight.narrow(0, *span) for span in spans]),
    )


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure_once(make: Callable[[], Tensor]) -> Figures:
    # Writing 5 sets the peak back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    start = time.perf_counter()
    shard = make()
    seconds = time.perf_counter() - start
    extra = memory("VmHWM") - before
    del shard
    return Figures(seconds, extra)


def summary(figures: list[Figures]) -> Figures:
    seconds = statistics.median(figure.seconds for figure in figures)
    return Figures(seconds, max(figure.extra for figure in figures))


def compare(case: Case, *, repeats: int) -> tuple[Figures, Figures, int]:
    """Our figures, torch's, and the bytes of the shard. Fails unless both make the same shard."""
    shard = case.ours()
    assert torch.equal(shard, case.torch())
    size = shard.nbytes
    del shard
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(measure_once(case.ours))
        theirs.append(measure_once(case.torch))
    return summary(ours), summary(theirs), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=16384, help="16384 float32 rows: 1 GiB")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    weight = torch.empty(options.features, options.features).uniform_()
    makers = (column_case, row_case, fused_case)
    cases = [maker(weight, ranks=ranks) for maker in makers for ranks in (2, 4)]
    table = Table(
        title=f"shard of {weight.nbytes / 2**30:.2f} GiB float32, {options.threads} threads"
    )
    for column in ("shard", "against", "ours ms", "torch ms", "ratio", "peak / shard"):
        table.add_column(column, justify="left" if column in ("shard", "against") else "right")
    for case in cases:
        ours, theirs, size = compare(case, repeats=options.repeats)
        table.add_row(
            case.name,
            case.expression,
            f"{ours.seconds * 1e3:.1f}",
            f"{theirs.seconds * 1e3:.1f}",
            f"{ours.seconds / theirs.seconds:.2f}",
            f"{ours.extra / size:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
