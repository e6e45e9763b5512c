# SPDX-License-Identifier: Apache-2.0
"""The table of a plan, made with rich: import it where it is used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from deepspeed_autotp._core import Entry, Plan, Source
from deepspeed_autotp.planning.plan_words import bytes_of_ranks


def rich_table(plan: Plan) -> Table:
    """See ``plan_table``."""
    table = Table(
        title=f"Sharding plan over {plan.ranks} ranks",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_footer=True,
    )
    rows = plan.table()
    everything = bytes_of_ranks(rows)
    table.add_column("parameters", "full model", overflow="fold")
    table.add_column("kind", no_wrap=True)
    for name, total in (
        ("full", decimal(sum(row.full_bytes for row in rows))),
        ("per rank", ""),
        ("bytes/rank", _bytes(everything)),
    ):
        table.add_column(name, total, justify="right", no_wrap=True)
    for row in rows:
        entry = row.entry
        shapes = [entry.local_shape(rank) for rank in range(plan.ranks)]
        table.add_row(
            escape(row.pattern) + (f" x{row.count}" if row.count > 1 else "") + _why(entry, plan),
            entry.kind,
            _shape(entry.shape),
            "x".join(_once(map(str, sizes)) for sizes in zip(*shapes, strict=True)),
            _bytes(row.local_bytes) if not entry.is_tied else "",
        )
    return table


def _why(entry: Entry, plan: Plan) -> str:
    """What decided, on a line of its own: the rule without the pattern, which repeats the name."""
    if entry.is_tied:
        reason = f"tied to {plan.entries[entry.tied_to].name}"
    elif entry.rule:
        style = entry.rule.rpartition(": ")[2] if entry.source is Source.TP_PLAN else entry.rule
        reason = f"{entry.source}: {style}"
    else:
        return ""
    return f"\n[dim]  {escape(reason)}[/]"


def _bytes(sizes: Sequence[int]) -> str:
    """``25.2|16.8 MB``; the unit once where all have the same."""
    words = list(dict.fromkeys(decimal(size) for size in sizes))
    units = {word.partition(" ")[2] for word in words}
    if len(units) > 1:
        return "|".join(words)
    return "|".join(word.partition(" ")[0] for word in words) + f" {units.pop()}"


def _once(words: Iterable[str]) -> str:
    return "|".join(dict.fromkeys(words))


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
