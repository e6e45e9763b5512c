# SPDX-License-Identifier: Apache-2.0
"""A plan for people to read."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from deepspeed_autotp._core import Entry, Plan


def plan_table(plan: Plan) -> Table:
    """One line per group of parameters: cut, rule, full and local shape, bytes per rank.

    ``rich.print(plan_table(plan))`` prints it. Local shapes and bytes are given once where all
    ranks have the same, else one after the other.
    """
    table = Table(
        title=f"Sharding plan over {plan.ranks} ranks", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("parameters", overflow="fold")
    table.add_column("cut", no_wrap=True)
    for name in ("full", "per rank", "bytes/rank"):
        table.add_column(name, justify="right", no_wrap=True)
    ranks = range(plan.ranks)
    for row in plan.table():
        entry = row.entry
        table.add_row(
            row.pattern + (f" x{row.count}" if row.count > 1 else "") + _rule(entry),
            entry.kind,
            _shape(entry.shape),
            _once(_shape(entry.local_shape(rank)) for rank in ranks),
            _once(decimal(size) for size in row.local_bytes),
        )
    return table


def _rule(entry: Entry) -> str:
    """The rule on a line of its own, without the pattern that repeats the parameter's name."""
    style = entry.rule.rpartition(": ")[2] if entry.source == "tp_plan" else entry.rule
    return f"\n[dim]  {escape(f'{entry.source}: {style}')}[/]" if style else ""


def _once(words: Iterable[str]) -> str:
    return " | ".join(dict.fromkeys(words))


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
