# SPDX-License-Identifier: Apache-2.0
"""What becomes of blocks that differ under a plan that the user did not write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from deepspeed_autotp._core import Plan
from deepspeed_autotp.self_check.compare import Difference, covers


class Replan(Protocol):
    """Makes the plan anew, with some modules replicated and others sharded layer by layer."""

    def __call__(
        self,
        replicated: Sequence[str],
        individual: Sequence[str],
        *,
        heuristics: bool = True,
        gather_logits: bool = False,
    ) -> Plan:
        """``heuristics``: layers may be sharded because of their names; ``gather_logits``: the
        output head keeps no shard of the logits."""


class Fallback:
    """A block that differs is sharded layer by layer; where that differs, too, or there is no layer
    to shard, it is replicated."""

    def __init__(self, replan: Replan) -> None:
        self._replan = replan
        self._individual: list[str] = []
        self._replicated: list[str] = []
        self._reasons: dict[tuple[str, ...], str] = {}
        self._logits_reason = ""

    def plan(self, *, gather_logits: bool = False) -> Plan:
        """With what was replicated, sharded individually and gathered so far."""
        return self._replan(
            self._replicated,
            self._individual,
            gather_logits=gather_logits or bool(self._logits_reason),
        )

    def gather_logits(self, found: Difference) -> None:
        """From now on the logits are gathered, since ``found`` is due to their shards."""
        self._logits_reason = found.text

    def plan_without(self, found: Difference) -> Plan:
        """ValueError where nothing would be left to shard."""
        if set(found.block) <= set(self._replicated):
            raise ValueError(f"{found.text}; replicating it did not help")
        if not found.quiet:
            self._reasons[found.block] = found.text
        fresh = [
            name for name in found.block if not found.replicate and name not in self._individual
        ]
        if fresh:
            self._individual += fresh
            plan = self._attempt()
            if plan is not None and any(covers(fresh, f"{x.module}.") for x in plan.layers):
                return plan
        self._replicated += found.block
        try:
            return self.plan()
        except ValueError as error:
            raise ValueError(f"{found.text}; and without that, {error}") from error

    def replicate(self, names: Sequence[str]) -> None:
        """Replicate modules without a warning: no rule asks for their shards."""
        self._replicated += names

    def warnings(self) -> list[str]:
        """One for each block, and one for the logits."""
        blocks = [
            f"{', '.join(block)} {self._fate(block)}: {reason}"
            for block, reason in self._reasons.items()
        ]
        why = self._logits_reason
        return [*blocks, f"the logits are gathered for the loss: {why}"] if why else blocks

    def _fate(self, block: tuple[str, ...]) -> str:
        if set(block) <= set(self._replicated):
            return "stays replicated"
        return "is sharded layer by layer, with full activations between the layers"

    def _attempt(self) -> Plan | None:
        try:
            return self.plan()
        except ValueError:
            return None
