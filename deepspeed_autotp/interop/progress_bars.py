# SPDX-License-Identifier: Apache-2.0
"""The progress bars of transformers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """A context in which transformers shows no progress bar, as where tensors without values are
    loaded or written."""
    bars = importlib.import_module("transformers.utils.logging")
    was_on = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            bars.enable_progress_bar()
