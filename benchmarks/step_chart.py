# SPDX-License-Identifier: Apache-2.0
"""Bar chart of benchmarks/step.py as SVG, from the figures that it writes as JSON.

    python -m benchmarks.step_chart          (remakes docs/images/step.svg from step.json beside it)

The same figures give the same text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.step_ways import WAYS
from tools.svg import Drawing

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
MIB = 2**20

# A row of the record, as benchmarks.step writes it.
Figures = Mapping[str, Any]

NAMES = 150.0  # width of the names of the ways
PANEL = 205.0
GAP = 14.0
BARS = 128.0  # the longest bar; its figure stands beside it
ROW = 24.0
HEAD = 62.0


@dataclass(frozen=True, slots=True)
class Panel:
    """One quantity; a bar has a dark and a pale segment, each with its words."""

    title: str
    dark: tuple[str, Callable[[Figures], float]]
    pale: tuple[str, Callable[[Figures], float]]

    def total(self, row: Figures) -> float:
        return self.dark[1](row) + self.pale[1](row)


def _calls(phase: str) -> Callable[[Figures], float]:
    return lambda row: float(sum(row["step"][phase]["calls"].values()))


def _mib(phase: str) -> Callable[[Figures], float]:
    return lambda row: float(row["step"][phase]["size"]) / MIB


# Times are ratios to the first way, which other work on the machine changes less.
PANELS = (
    Panel(
        "collectives of a step",
        dark=("forward", _calls("forward")),
        pale=("backward", _calls("backward")),
    ),
    Panel(
        "MiB in collectives",
        dark=("forward", _mib("forward")),
        pale=("backward", _mib("backward")),
    ),
    Panel(
        "relative step time",
        dark=("collectives", lambda row: row["over_first"] * max(0.0, 1 - 1 / row["over_bare"])),
        pale=("other work", lambda row: row["over_first"] * min(1.0, 1 / row["over_bare"])),
    ),
    Panel(
        "peak memory, MiB",
        dark=("parameters", lambda row: row["held"] / MIB),
        pale=("step", lambda row: (row["peak"] - row["held"]) / MIB),
    ),
)


def chart(record: Mapping[str, Any]) -> str:
    """For each length of sequence a line of panels, with one bar for each way."""
    groups = [list(group) for _, group in groupby(record["rows"], key=lambda r: r["sequence"])]
    heights = [HEAD + ROW * len(group) for group in groups]
    width = NAMES + len(PANELS) * (PANEL + GAP)
    d = Drawing(round(width), round(sum(heights) + 34), title="What a training step costs")
    top = 0.0
    for group, height in zip(groups, heights, strict=True):
        _group(d, group, top)
        top += height
    d.text(8, top + 22, _described(record), "soft", size=10.5, anchor="start")
    return d.render()


def _group(d: Drawing, rows: Sequence[Figures], top: float) -> None:
    d.text(8, top + 24, f"sequence {rows[0]['sequence']}", size=13, anchor="start", bold=True)
    for index, row in enumerate(rows):
        bold = not row["way"].startswith(("deepspeed", "transformers"))
        d.text(8, _line(top, index), WAYS[row["way"]].label, anchor="start", bold=bold)
    for column, panel in enumerate(PANELS):
        left = NAMES + column * (PANEL + GAP)
        _panel(d, rows, panel, left, top)


def _panel(d: Drawing, rows: Sequence[Figures], panel: Panel, left: float, top: float) -> None:
    d.text(left, top + 24, panel.title, anchor="start", bold=True)
    x = left
    for (label, _), name in ((panel.dark, "forward"), (panel.pale, "pale")):
        d.rect(x, top + 35, 9, 9, name)
        d.text(x + 13, top + 44, label, "soft", size=11, anchor="start")
        x += 86
    scale = BARS / max(panel.total(row) for row in rows)
    for index, row in enumerate(rows):
        y = _line(top, index) - 12
        dark, pale = panel.dark[1](row) * scale, panel.pale[1](row) * scale
        d.rect(left, y, dark, 16, "forward")
        d.rect(left + dark, y, pale, 16, "pale")
        d.text(left + dark + pale + 6, y + 12, f"{panel.total(row):.3g}", size=11, anchor="start")


def _line(top: float, index: int) -> float:
    """The base line of a row."""
    return top + HEAD + ROW * index + 6


def _described(record: Mapping[str, Any]) -> str:
    model, about = record["setting"], record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        f"{model['layers']}-layer Llama, hidden {model['hidden']}, float32, TP {model['tp']}; "
        f"medians of {model['rounds']} rounds on {about['cores']} cores "
        f"({about['processor']}); {versions}"
    )


if __name__ == "__main__":
    figures = json.loads((IMAGES / "step.json").read_text())
    (IMAGES / "step.svg").write_text(chart(figures))
