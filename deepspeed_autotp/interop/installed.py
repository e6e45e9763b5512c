# SPDX-License-Identifier: Apache-2.0
"""What is installed, found without importing it: what is made of it depends on that."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

# (path, size, time of the last change in nanoseconds)
Stamp = tuple[str, int, int]

# What makes models, and reads them.
_MAKERS = ("torch", "transformers", "peft", "deepspeed_autotp")
_INFO = (".dist-info", ".egg-info")


def installed() -> list[str]:
    """Python, each installed package with its version, and where those are that make models."""
    names = {name for folder in sys.path for name in _listed(folder) if name.endswith(_INFO)}
    return [sys.version, *_places(), *sorted(names)]


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder or ".")
    except OSError:
        return []


def _places() -> Iterator[str]:
    for name in _MAKERS:
        spec = find_spec(name)
        yield f"{name} {None if spec is None else spec.origin}"


def stamps_of_makers() -> list[Stamp]:
    """The files of those that this process has imported, but for torch, whose version tells all: a
    change of one in its place, as while it is developed, leaves the version alone."""
    return [stamp for path in sorted(_imported_files()) if (stamp := stamp_of(path)) is not None]


def _imported_files() -> Iterator[str]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _MAKERS[1:] and isinstance(module, ModuleType):
            path = vars(module).get("__file__")
            if isinstance(path, str):
                yield path


def stamp_of(path: str) -> Stamp | None:
    """None where there is no such file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return path, found.st_size, found.st_mtime_ns
