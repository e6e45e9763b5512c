# SPDX-License-Identifier: Apache-2.0
"""How much of a checkpoint has been read, shown while it is."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int | None) -> Iterator[Callable[[int], object]]:
    """A function that advances a bar of ``total`` bytes; no bar where that is None, or where tqdm
    is not installed."""
    if total is None or importlib.util.find_spec("tqdm") is None:
        yield lambda _: None
        return
    tqdm = importlib.import_module("tqdm.auto").tqdm
    with tqdm(total=total, desc="Reading shards", unit="B", unit_scale=True) as bar:
        yield bar.update
