# SPDX-License-Identifier: Apache-2.0
"""What rank 0 logs of a model that was sharded: one line, and with AUTOTP_LOG=debug why."""

from __future__ import annotations

import logging
import time

from deepspeed_autotp._core import Plan
from deepspeed_autotp.planning.model_description import Description
from deepspeed_autotp.planning.plan_words import decisions, report_line
from deepspeed_autotp.planning.planner import PlanRequest

_log = logging.getLogger("deepspeed_autotp")


class Stopwatch:
    """Seconds of one thing after the other, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def note(self, name: str) -> None:
        """What was done since the last note, or since the start, was ``name``."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def log_report(
    description: Description,
    plan: Plan,
    request: PlanRequest,
    watch: Stopwatch,
    *,
    is_first: bool,
) -> None:
    """The line, and with AUTOTP_LOG=debug the decisions; on rank 0 alone."""
    if not is_first:
        return
    took = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in watch.seconds.items())
    later = description.replaced_later
    line = report_line(plan, replicated=request.replicated, replaced_later=later)
    _log.info("%s: %s; %s", type(description.modules[""]).__name__, line, took)
    if _log.isEnabledFor(logging.DEBUG):
        for decision in decisions(plan):
            _log.debug("%s", decision)
