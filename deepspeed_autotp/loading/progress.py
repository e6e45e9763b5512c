# SPDX-License-Identifier: Apache-2.0
"""How much of a checkpoint has been read or written, shown while it is."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    total: int | None, title: str = "Reading shards", unit: str = "B"
) -> Iterator[Callable[[int], object]]:
    """A function that advances a bar of ``total`` units; no bar where that is None, or where tqdm
    is not installed."""
    if total is None or importlib.util.find_spec("tqdm") is None:
        yield lambda _: None
        return
    tqdm = importlib.import_module("tqdm.auto").tqdm
    with tqdm(total=total, desc=title, unit=unit, unit_scale=unit == "B") as bar:
        yield bar.update
