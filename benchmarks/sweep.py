# SPDX-License-Identifier: Apache-2.0
"""Train every causal language model of transformers sharded, and compare it with one process.

    python -m benchmarks.sweep --tp 2 --out table.json --markdown table.md

Each model type of transformers is shrunk (benchmarks/shrink.py), trained for four SGD steps in
one process and at the TP size over gloo, without clipping and with the gradient
norm clipped at 1. A row of the table says how far losses and weights differ, which share of the
parameters the fullest rank holds, and how many collectives a step takes; or why there is none.
With --sequence-parallel the tokens are sharded between blocks, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.shrink import MODEL_TYPES
from benchmarks.sweep_rank import Measured
from tests.support.worker_pool import Pool, PoolError

CLIPS = (0.0, 1.0)
# A sharded run rounds differently. What is wrong differs by far more.
LOSS_LIMIT = 2e-4
UPDATE_LIMIT = 1e-2
OUTCOMES = ("ok", "differs", "refused", "damaged", "crashed", "hang", "unable")
# What varies between reasons that are the same: quoted words, dotted names, classes, figures.
_VARYING = re.compile(
    r"""(?<!\w)'[^']*'|"[^"]*"|[\w*]+(?:\.[\w*]+)+"""
    r"""|\b\w*[a-z][A-Z]\w*(?:For[A-Z]\w*|LM\w*|Model|Decoder)\b|\d+(?:e-\d+)?"""
)


@dataclass(frozen=True, slots=True)
class Row:
    """One model type. ``loss``, ``norm`` and ``update`` are the worst over the clipping norms;
    ``share`` is what the fullest rank holds of the parameters."""

    model_type: str
    outcome: str
    reason: str
    loss: float | None = None
    norm: float | None = None
    update: float | None = None
    share: float | None = None
    parameters: int = 0
    forward: int = 0
    backward: int = 0
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


def judged_rows(file: Path) -> list[Row]:
    """The rows that ``--out`` has written."""
    return [Row(**row) for row in json.loads(file.read_text())]


def sweep_one(
    pool: Pool,
    model_type: str,
    *,
    tp: int,
    clips: tuple[float, ...],
    timeout: float,
    sequence_parallel: bool = False,
) -> Row:
    began = time.monotonic()
    job = ("benchmarks.sweep_rank:measure", model_type, clips, sequence_parallel)
    try:
        ranks: list[Measured] = pool.run(*job, ranks=tp, timeout=timeout)
        row = judge(model_type, ranks)
    except PoolError as error:
        outcome = "hang" if error.kind == "timeout" else "crashed"
        row = Row(model_type, outcome, _first_failure(error))
    return dataclasses.replace(row, seconds=time.monotonic() - began)


def judge(model_type: str, ranks: Sequence[Measured]) -> Row:
    """The row of a model type whose ranks all reported."""
    states = {rank.state for rank in ranks}
    if len(states) > 1:
        said = "; ".join(f"rank {i}: {r.state} {r.reason}" for i, r in enumerate(ranks))
        return Row(model_type, "crashed", f"the ranks disagree: {said}")
    first = ranks[0]
    if first.state != "trained":
        return Row(model_type, first.state, first.reason, parameters=first.parameters)
    loss, norm, update = (
        max(max(figures.values()) for figures in each)
        for each in (
            [rank.losses for rank in ranks],
            [rank.norms for rank in ranks],
            [rank.updates for rank in ranks],
        )
    )
    wrong = [
        f"{name} by {value:.1e}"
        for name, value, limit in (
            ("losses", loss, LOSS_LIMIT),
            ("gradient norms", norm, LOSS_LIMIT),
            ("weights", update, UPDATE_LIMIT),
        )
        if value > limit
    ]
    return Row(
        model_type,
        "differs" if wrong else "ok",
        ", ".join(wrong),
        loss=loss,
        norm=norm,
        update=update,
        share=max(rank.local for rank in ranks) / first.parameters,
        parameters=first.parameters,
        forward=first.forward,
        backward=first.backward,
        warnings=first.warnings,
    )


def _first_failure(error: PoolError) -> str:
    """The headline of what went wrong, with the last line of the package or of transformers."""
    text = str(error)
    places = re.findall(r'File "[^"]*/([^"/]+)", line \d+, in (\w+)', text)
    place = f" ({places[-1][0]}, {places[-1][1]})" if places and error.kind != "timeout" else ""
    return " ".join(text.splitlines()[0].split()) + place


def group_reasons(rows: Iterable[Row]) -> list[tuple[str, list[str]]]:
    """Reasons with the names and figures taken out, and the model types of each, most first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        groups[f"{row.outcome}: {_VARYING.sub('_', row.reason)[:160]}"].append(row.model_type)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def totals(rows: Sequence[Row], *, tp: int) -> list[str]:
    counts = {name: sum(row.outcome == name for row in rows) for name in OUTCOMES}
    trainable = len(rows) - counts["unable"]
    good = [row for row in rows if row.outcome == "ok" and row.share is not None]
    lines = [
        f"TP {tp}: {counts['ok']} of {trainable} that one process trains "
        f"({len(rows)} model types in transformers)",
        ", ".join(f"{count} {name}" for name, count in counts.items()),
    ]
    if good:
        shares = [row.share for row in good if row.share is not None]
        close = sum(row.loss is not None and row.loss <= 1e-5 for row in good)
        lines.append(
            f"parameters per rank: mean {statistics.mean(shares):.3f}, most {max(shares):.3f}; "
            f"losses within 1e-5: {close} of {len(good)}"
        )
    return lines


def _cells(row: Row) -> list[str]:
    figures = [row.loss, row.norm, row.update]
    share = "" if row.share is None else f"{row.share:.3f}"
    calls = f"{row.forward}+{row.backward}" if row.share is not None else ""
    said = row.reason or "; ".join(row.warnings)
    return [
        row.model_type,
        row.outcome,
        *("" if figure is None else f"{figure:.0e}" for figure in figures),
        share,
        calls,
        said[:120],
    ]


HEADINGS = ("model type", "outcome", "loss", "norm", "weights", "share", "calls", "remark")


def _print(console: Console, rows: Sequence[Row], *, tp: int) -> None:
    table = Table(title=f"TP {tp}")
    for heading in HEADINGS[:-1]:
        table.add_column(heading, no_wrap=True)
    table.add_column(HEADINGS[-1], overflow="ellipsis", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    for line in totals(rows, tp=tp):
        console.print(line)
    for reason, names in group_reasons(row for row in rows if row.outcome != "ok"):
        console.print(f"{len(names)} {reason}: {' '.join(names)}", markup=False)


def _markdown(rows: Sequence[Row], *, tp: int) -> str:
    lines = [*totals(rows, tp=tp), ""]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(c.replace("|", "\\|") for c in _cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, default=2, help="TP size")
    parser.add_argument("--clip", type=float, help="one clipping norm; 0 is none (default: both)")
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--sequence-parallel", action="store_true", help="shard tokens, too")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a model type")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--markdown", type=Path, help="write totals and table as Markdown")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else MODEL_TYPES
    unknown = sorted(set(names) - set(MODEL_TYPES))
    if unknown:
        parser.error(f"--only: not a causal language model of transformers: {', '.join(unknown)}")
    clips = CLIPS if options.clip is None else (options.clip,)

    console = Console()
    pool = Pool(options.tp)
    rows = []
    try:
        for name in names:
            row = sweep_one(
                pool,
                name,
                tp=options.tp,
                clips=clips,
                timeout=options.timeout,
                sequence_parallel=options.sequence_parallel,
            )
            rows.append(row)
            progress = f"{len(rows)}/{len(names)} {row.seconds:5.1f} s  {row.outcome:8} {name}"
            console.print(progress, markup=False, highlight=False)
            if options.out:
                options.out.write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=1))
    finally:
        pool.close()
    _print(console, rows, tp=options.tp)
    if options.markdown:
        options.markdown.write_text(_markdown(rows, tp=options.tp))


if __name__ == "__main__":
    main()
