# SPDX-License-Identifier: Apache-2.0
"""Blocks that the trial takes out of a plan that nobody wrote for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from deepspeed_autotp._core import Plan
from deepspeed_autotp.self_check.compare import Difference, covers


class Again(Protocol):
    """Makes the plan anew, with modules left whole and others cut layer by layer."""

    def __call__(
        self, replicated: Sequence[str], individual: Sequence[str], *, heuristics: bool = True
    ) -> Plan:
        """``heuristics``: layers may be sharded because of their names."""


class Exempt:
    """What was found to differ: its layers are cut one by one; where that differs, too, or there
    is no layer to cut, it stays whole."""

    def __init__(self) -> None:
        self._apart: list[str] = []
        self._whole: list[str] = []
        self._reasons: dict[tuple[str, ...], str] = {}

    def plan_without(self, found: Difference, again: Again) -> Plan:
        """ValueError where nothing would be left to cut."""
        if set(found.block) <= set(self._whole):
            raise ValueError(f"{found.text}; leaving it whole did not help")
        if not found.quiet:
            self._reasons[found.block] = found.text
        fresh = [name for name in found.block if not found.whole and name not in self._apart]
        if fresh:
            self._apart += fresh
            plan = _attempt(again, self._whole, self._apart)
            if plan is not None and any(covers(fresh, f"{x.module}.") for x in plan.layers):
                return plan
        self._whole += found.block
        try:
            return again(self._whole, self._apart)
        except ValueError as error:
            raise ValueError(f"{found.text}; and without that, {error}") from error

    def leave_whole(self, names: Sequence[str]) -> None:
        """Leave modules whole that nobody expects to be cut, without a warning."""
        self._whole += names

    def warnings(self) -> list[str]:
        """One for each block."""
        return [
            f"{', '.join(block)} {self._fate(block)}: {reason}"
            for block, reason in self._reasons.items()
        ]

    def _fate(self, block: tuple[str, ...]) -> str:
        if set(block) <= set(self._whole):
            return "stays whole on every rank"
        return "is cut layer by layer, each giving or taking whole activations"


def _attempt(again: Again, whole: Sequence[str], apart: Sequence[str]) -> Plan | None:
    try:
        return again(whole, apart)
    except ValueError:
        return None
