# SPDX-License-Identifier: Apache-2.0
"""Tables of benchmarks/step.py."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.step_calls import KINDS
from benchmarks.step_rows import Row, Traffic
from benchmarks.step_ways import WAYS

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the figures come from; ``load`` is the average of the last minute."""

    processor: str
    cores: int
    load: float
    versions: Mapping[str, str]

    def described(self) -> str:
        names = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"{self.cores} cores ({self.processor}), load {self.load:.1f}; {names}"


def machine() -> Machine:
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        load=os.getloadavg()[0],
        versions={name: version(name) for name in ("torch", "deepspeed", "transformers")},
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def print_tables(
    console: Console, rows: Sequence[Row], model: Mapping[str, int], about: Machine
) -> None:
    """Two tables for each length of sequence."""
    console.print(
        "Llama, float32, SGD: " + ", ".join(f"{k} {v}" for k, v in model.items()), highlight=False
    )
    for sequence, group in groupby(rows, key=lambda row: row.sequence):
        ways = list(group)
        console.print(_traffic_table(sequence, ways))
        console.print(_cost_table(sequence, ways, about))


def _traffic_table(sequence: int, rows: Sequence[Row]) -> Table:
    table = Table(
        title=f"collectives, sequence {sequence}: forward + backward (+ update)",
        caption=f"MiB are a rank's in collectives. {_transports(rows)}{_alone(rows)}",
    )
    step, layer = _kinds([row.step for row in rows]), _kinds([row.layer for row in rows])
    table.add_column("way", no_wrap=True)
    for heading in (
        *step,
        "MiB",
        "ratio",
        *(f"{kind}\n/ layer" for kind in layer),
        "MiB\n/ layer",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    first = _bytes(rows[0].step)
    for row in rows:
        table.add_row(
            WAYS[row.way].label,
            *(_calls(row.step, kind) for kind in step),
            _sizes(row.step),
            f"{_bytes(row.step) / first:.2f}",
            *(_calls(row.layer, kind) for kind in layer),
            _sizes(row.layer),
        )
    return table


def _kinds(steps: Sequence[Mapping[str, Traffic]]) -> list[str]:
    """The kinds of collectives that occur."""
    return [kind for kind in KINDS if any(kind in t.calls for s in steps for t in s.values())]


def _transports(rows: Sequence[Row]) -> str:
    used = sorted({tuple(row.transports) for row in rows})
    if len(used) == 1:
        return f"All are carried by {' and '.join(used[0])}."
    carried = (f"{WAYS[row.way].label} by {' and '.join(row.transports)}" for row in rows)
    return f"Carried: {', '.join(carried)}."


def _alone(rows: Sequence[Row]) -> str:
    said = [f"{row.alone} ({WAYS[row.way].label})" for row in rows if row.alone]
    return f" Left out are calls over groups of one rank: {', '.join(said)}." if said else ""


def _cost_table(sequence: int, rows: Sequence[Row], about: Machine) -> Table:
    table = Table(
        title=f"time and memory of a step, sequence {sequence}",
        caption=f"Medians; ratios are to {WAYS[rows[0].way].label}, those of time within a round. "
        f"Bare: without collectives. Work: processor time of all ranks. Held: the parameters. "
        f"{about.described()}",
    )
    table.add_column("way", no_wrap=True)
    times = ("step\nms", "ratio", "step\n/ bare", "work\nms", "ratio", "work\n/ bare")
    headings = (*times, "peak\nMiB", "ratio", "held\nMiB")
    for heading in (*headings, "first\nloss", "last\nloss", "off by"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            WAYS[row.way].label,
            f"{row.seconds * 1e3:.1f}",
            f"{row.over_first:.2f}",
            f"{row.over_bare:.2f}",
            f"{row.processor * 1e3:.1f}",
            f"{row.processor_over_first:.2f}",
            f"{row.processor_over_bare:.2f}",
            f"{row.peak / MIB:.1f}",
            f"{row.peak / rows[0].peak:.2f}",
            f"{row.held / MIB:.1f}",
            f"{row.losses[0]:.5f}",
            f"{row.losses[-1]:.5f}",
            f"{row.loss_difference:.0e}",
        )
    return table


def _bytes(phases: Mapping[str, Traffic]) -> int:
    return sum(traffic.size for traffic in phases.values())


def _calls(phases: Mapping[str, Traffic], kind: str) -> str:
    return _joined([(t.calls.get(kind, 0), str(t.calls.get(kind, 0))) for t in phases.values()])


def _sizes(phases: Mapping[str, Traffic]) -> str:
    return _joined([(t.size, f"{t.size / MIB:.2f}") for t in phases.values()])


def _joined(figures: Sequence[tuple[int, str]]) -> str:
    """``forward + backward``, and the update where there is something to say."""
    shown = [text for index, (value, text) in enumerate(figures) if index < 2 or value]
    return " + ".join(shown)
