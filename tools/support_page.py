# SPDX-License-Identifier: Apache-2.0
"""docs/support.md from docs/support.json, which is made of sweeps at several TP sizes:

    python -m tools.support_page 2=tp2.json 3=tp3.json 4=tp4.json

Each file is what ``python -m benchmarks.sweep --tp N --out FILE`` has written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.sweep import OUTCOMES, Row, judged_rows

DOCS = Path(__file__).resolve().parents[1] / "docs"
RECORD = DOCS / "support.json"

# What the page needs of a row, in this order.
_KEPT = ("outcome", "reason", "share", "loss", "update")
_NOT_THERE = "not run"

_BEGINNING = """\
# Support matrix

Causal language models of transformers {transformers}, shrunk to 2 layers (torch {torch}, gloo on
CPUs, float32): four SGD steps, sharded and in one process, each without clipping and with the
gradient norm clipped at 1.

A cell has the share of the parameters that the fullest rank holds, how far losses are at most from
those of one process (relative), and how far a weight is from that of one process, as a part of how
far it moved. Smallest shares are 0.50, 0.33 and 0.25; shrunken models have more that is replicated
or uneven than large ones, so `autotp plan MODEL --tp N` says what holds for yours.
"""
_HOW = """
## How to make this page

`make support` runs the sweep at TP 2, 3 and 4 and writes the record and the page; it takes many
minutes for each size. `make support SWEEP="--only llama,gpt2"` does so for some model types.
"""


def record(sweeps: Mapping[int, Sequence[Row]], versions: Mapping[str, str]) -> dict[str, Any]:
    """What is kept of sweeps, by TP size and model type."""
    return {
        **versions,
        "rows": {
            str(tp): {
                row.model_type: [_short(getattr(row, name)) for name in _KEPT]
                for row in sorted(rows, key=lambda row: row.model_type)
            }
            for tp, rows in sorted(sweeps.items())
        },
    }


def _short(value: object) -> object:
    """Two digits of a number are enough."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def as_text(kept: Mapping[str, Any]) -> str:
    """The record as JSON with a line for each model type, so that a difference can be read."""
    parts = [f"  {json.dumps(name)}: {json.dumps(kept[name])}" for name in kept if name != "rows"]
    sizes = []
    for tp, rows in kept["rows"].items():
        lines = [f"      {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
        sizes.append(f"    {json.dumps(tp)}: {{\n" + ",\n".join(lines) + "\n    }")
    parts.append('  "rows": {\n' + ",\n".join(sizes) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def page(kept: Mapping[str, Any] | None = None) -> str:
    """The page, from the record in docs/ if no other is given."""
    kept = json.loads(RECORD.read_text()) if kept is None else kept
    rows = {
        int(tp): {name: dict(zip(_KEPT, row, strict=True)) for name, row in of.items()}
        for tp, of in kept["rows"].items()
    }
    sizes = list(rows)
    parts = [_BEGINNING.format(**kept), "\n", *_totals(rows)]
    names = sorted({name for of in rows.values() for name in of})
    parts.append(f"\nThe record has {len(names)} model types.\n")
    heads = " | ".join(f"TP {tp}" for tp in sizes)
    parts.append(f"\n## Model types\n\n| model type | {heads} |\n|---|{'---|' * len(sizes)}\n")
    for name in names:
        cells = " | ".join(_cell(rows[tp].get(name)) for tp in sizes)
        parts.append(f"| {name} | {cells} |\n")
    return "".join([*parts, *_reasons(rows), _HOW])


def _totals(rows: Mapping[int, Mapping[str, dict[str, Any]]]) -> list[str]:
    lines = ["| | " + " | ".join(f"TP {tp}" for tp in rows) + " |\n", "|---|" + "---|" * len(rows)]
    lines.append("\n")
    outcomes = {
        name: [sum(row["outcome"] == name for row in of.values()) for of in rows.values()]
        for name in OUTCOMES
    }
    for name, counts in outcomes.items():
        if any(counts):
            lines.append(f"| {_WORDS[name]} | " + " | ".join(map(str, counts)) + " |\n")
    shares = []
    for of in rows.values():
        held = [row["share"] for row in of.values() if row["outcome"] == "ok"]
        shares.append(f"{sum(held) / len(held):.3f}" if held else "")
    lines.append(f"| parameters of the fullest rank, mean share | {' | '.join(shares)} |\n")
    return lines


# What an outcome of the sweep is called on the page.
_WORDS = {
    "ok": "trains as one process does",
    "differs": "differs",
    "refused": "refused before anything changes",
    "damaged": "refused after something changed",
    "crashed": "crashes",
    "hang": "hangs",
    "unable": "not trained by one process",
}


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return _NOT_THERE
    if row["outcome"] != "ok":
        return str(row["outcome"])
    return f"{row['share']:.2f}, {row['loss']:.0e}, {row['update']:.0e}"


def _reasons(rows: Mapping[int, Mapping[str, dict[str, Any]]]) -> list[str]:
    """Why a model type is not trained, once for each reason."""
    found: dict[tuple[str, str], list[int]] = {}
    for tp, of in rows.items():
        for name, row in of.items():
            if row["outcome"] != "ok":
                found.setdefault((name, row["reason"]), []).append(tp)
    if not found:
        return []
    lines = ["\n## What is not trained\n\n| model type | TP size | reason |\n|---|---|---|\n"]
    for (name, reason), sizes in sorted(found.items()):
        text = " ".join(reason.split())[:300].replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {name} | {', '.join(map(str, sizes))} | {text} |\n")
    return lines


def main(arguments: Sequence[str]) -> None:
    sweeps = {}
    for each in arguments:
        tp, _, file = each.partition("=")
        sweeps[int(tp)] = judged_rows(Path(file))
    versions = {name: version(name).partition("+")[0] for name in ("transformers", "torch")}
    kept = record(sweeps, versions)
    RECORD.write_text(as_text(kept), encoding="utf-8")
    (DOCS / "support.md").write_text(page(kept), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
