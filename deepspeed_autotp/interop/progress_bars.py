# SPDX-License-Identifier: Apache-2.0
"""Progress bars, ours and those of transformers, and its warnings."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Work that takes fewer seconds shows none.
_SHORT = 1.0


@contextmanager
def progress_bar(
    total: int | None, title: str = "Reading shards", unit: str = "B"
) -> Iterator[Callable[[int], object]]:
    """A function that advances a bar of ``total`` units, on a terminal.

    There is no bar where ``total`` is None, for short work, and where tqdm is not installed.
    """
    if total is None or importlib.util.find_spec("tqdm") is None:
        yield lambda _: None
        return
    tqdm = importlib.import_module("tqdm.auto").tqdm
    options = {"unit": unit, "unit_scale": unit == "B", "delay": _SHORT}
    with tqdm(total=total, desc=title, disable=None, **options) as bar:
        yield bar.update


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


@contextmanager
def without_warnings() -> Iterator[None]:
    """A context in which transformers logs errors only, as where a model is made that
    the user has not named."""
    logs = importlib.import_module("transformers.utils.logging")
    before = logs.get_verbosity()
    logs.set_verbosity_error()
    try:
        yield
    finally:
        logs.set_verbosity(before)
