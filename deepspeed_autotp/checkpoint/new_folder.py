# SPDX-License-Identifier: Apache-2.0
"""A folder that comes into being with all of its files, or not at all."""

from __future__ import annotations

import errno
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
        raise _taken(folder, "exists")
    above = next(parent for parent in folder.parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{str(folder)!r}: {str(above)!r} is a file, expected a folder; name "
                         "another place")  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    made, lock = _made_beside(folder)
    try:
        yield made
        for entry in [*made.rglob("*"), made]:
            sync(entry)
        make_like_new(made, mode=0o777)
        _rename(made, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _taken(folder: Path, how: str) -> ValueError:
    return ValueError(
        f"{str(folder)!r} {how}, expected a folder that is empty or not there; name another one, "
        "or remove it"
    )


def _made_beside(folder: Path) -> tuple[Path, int]:
    """A hidden folder with its lock. Until it has that, another process takes it for a leftover."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}{_MARK}", dir=folder.parent))
        try:
            lock = locked(made)
        except (BlockingIOError, FileNotFoundError):
            continue
        if made.exists():
            return made, lock
        os.close(lock)


def _rename(made: Path, folder: Path) -> None:
    try:
        os.replace(made, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _taken(folder, "was written by another process meanwhile") from error
        raise


def _remove_leftovers(folder: Path) -> None:
    """Remove what no process has a lock of."""
    for left in folder.parent.glob(f".{escaped(folder.name)}{_MARK}*"):
        try:
            lock = locked(left, required=True)
        except OSError:
            continue
        shutil.rmtree(left, ignore_errors=True)
        os.close(lock)
