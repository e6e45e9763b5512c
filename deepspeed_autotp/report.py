# SPDX-License-Identifier: Apache-2.0
"""A plan for people to read."""

from __future__ import annotations

from rich.filesize import decimal
from rich.table import Table

from deepspeed_autotp._core import Plan


def plan_table(plan: Plan) -> Table:
    """One line per group of parameters: rule, full and local shape, bytes per rank."""
    table = Table(title=f"Sharding plan over {plan.ranks} ranks ({plan.hash})")
    for name in ("parameters", "cut", "rule", "from"):
        table.add_column(name, overflow="fold")
    for name in ("full shape", "local shape", "bytes per rank"):
        table.add_column(name, justify="right")
    for row in plan.table():
        entry = row.entry
        times = f" x{row.count}" if row.count > 1 else ""
        locals_ = dict.fromkeys(entry.local_shape(rank) for rank in range(plan.ranks))
        table.add_row(
            row.pattern + times,
            entry.kind,
            entry.rule or "-",
            entry.source,
            _shape(entry.shape),
            " | ".join(_shape(shape) for shape in locals_),
            " | ".join(dict.fromkeys(decimal(size) for size in row.local_bytes)),
        )
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
