# SPDX-License-Identifier: Apache-2.0
"""The collectives that a block of code calls."""

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.step_calls import Recorder


@contextmanager
def recorded_collectives() -> Iterator[list[tuple[str, int]]]:
    """Kind and bytes of every collective within, as a rank gives them; there once it has ended."""
    calls: list[tuple[str, int]] = []
    with Recorder() as recorder:
        yield calls
    calls.extend((call.kind, call.size) for call in recorder.calls)
