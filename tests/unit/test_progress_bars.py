# SPDX-License-Identifier: Apache-2.0
"""Progress bars of long work, on a terminal."""

import io
import sys

import pytest

from deepspeed_autotp.interop import progress_bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("shown", "total", "seconds", "expected"),
    [
        (Terminal(), 10, 0.0, True),
        (Terminal(), 10, 60.0, False),
        (Terminal(), None, 0.0, False),
        (io.StringIO(), 10, 0.0, False),
    ],
    ids=["long work", "short work", "another rank", "no terminal"],
)
def test_a_bar_is_shown_on_a_terminal_for_long_work(
    monkeypatch: pytest.MonkeyPatch,
    shown: io.StringIO,
    total: int | None,
    seconds: float,
    expected: bool,
) -> None:
    monkeypatch.setattr(progress_bars, "_SHORT", seconds)
    monkeypatch.setattr(sys, "stderr", shown)
    with progress_bars.progress_bar(total, "Saving weights") as advance:
        advance(4)
        advance(6)
    assert ("Saving weights: 100%" in shown.getvalue()) is expected
    assert bool(shown.getvalue()) is expected
