# SPDX-License-Identifier: Apache-2.0
"""A plan for people to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepspeed_autotp._core import Plan

if TYPE_CHECKING:
    from rich.table import Table


def plan_table(plan: Plan) -> Table:
    """One row per group of parameters: kind, rule, full and local shape, bytes per rank.

    ``rich.print(plan_table(plan))`` prints it. Where ranks have different sizes, these are
    given one after the other, each once: ``6|5x64``. The last row is the sum over the model.
    """
    # Only who prints a plan waits for rich.
    from deepspeed_autotp.planning.rich_table import rich_table

    return rich_table(plan)
