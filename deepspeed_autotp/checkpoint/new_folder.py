# SPDX-License-Identifier: Apache-2.0
"""A folder that comes into being with all of its files, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepspeed_autotp.checkpoint.atomic_folder import escaped, locked, make_like_new, sync

_MARK = ".autotp-writing-"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``folder`` at the end of the context.

    It is beside it under a hidden name; what is written is on the disk before it is renamed. After
    an error nothing of it is left, and what a killed process has left is removed. ValueError where
    ``folder`` has files already.
    """
    folder = folder.resolve()
    if folder.is_mount():  # which no rename takes the place of
        raise ValueError(f"{str(folder)!r} is a mount point, expected a folder in one; name that")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{str(folder)!r} exists, expected a folder that is empty or not there; name another "
            "one, or remove it"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}{_MARK}", dir=folder.parent))
    lock = locked(made)
    try:
        yield made
        for entry in [*made.rglob("*"), made]:
            sync(entry)
        make_like_new(made, mode=0o777)
        os.replace(made, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _remove_leftovers(folder: Path) -> None:
    """Remove what nobody has a lock of."""
    for left in folder.parent.glob(f".{escaped(folder.name)}{_MARK}*"):
        try:
            lock = locked(left, surely=True)
        except OSError:
            continue
        shutil.rmtree(left, ignore_errors=True)
        os.close(lock)
