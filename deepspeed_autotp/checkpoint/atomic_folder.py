# SPDX-License-Identifier: Apache-2.0
"""Files that come into a folder together: after a crash at any moment all are there, or none.

They are written into a hidden folder beside their places, brought to the disk, and renamed. What a
crash leaves of it is recognised by its name, which no loader reads, and removed by the next save.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# How the names begin of what is not written to its end.
UNFINISHED = ".autotp-saving-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_atomically(file: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Replace ``file`` by one with ``data``: it has the old content or the new one, always."""
    handle, name = tempfile.mkstemp(prefix=UNFINISHED, dir=file.parent)
    try:
        with open(handle, "wb") as written:
            written.write(data)
        make_like_new(Path(name), mode=mode)
        sync(Path(name))
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync(file.parent)


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """The name of a file to write, which takes the place of ``file`` at the end.

    A process that does not write it changes nothing; what an earlier one has left is removed.
    """
    temporary = file.with_name(f"{UNFINISHED}{file.name}-{os.getpid()}")
    try:
        yield temporary
        if temporary.exists():
            sync(temporary)
            os.replace(temporary, file)
            sync(file.parent)
            for left in file.parent.glob(f"{UNFINISHED}{escaped(file.name)}-*"):
                left.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class AtomicFolder:
    """A save into ``folder``, which is made where it is missing, by one process.

    ``staging`` is the folder to write into, with the names that the files will have. OSError where
    the folder cannot be written to, and where another save is writing into it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{str(folder)!r} is a file, expected a folder")
        self._made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.folder)
        try:
            _remove_leftovers(self.folder)
            self.staging = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self.folder))
        except BaseException:
            os.close(self._lock)
            raise

    def commit(self, names: Sequence[str], *, drop: Iterable[str] = ()) -> None:
        """Rename the files of ``staging`` to their places, ``names`` in this order, the last of
        which makes a loader read the others; then remove the files ``drop``, in their order.

        What was read before may be replaced by the last name only.
        """
        self._sync_staged()
        *before, last = names
        for name in before:
            os.replace(self.staging / name, self.folder / name)
        sync(self.folder)
        os.replace(self.staging / last, self.folder / last)
        sync(self.folder)
        for name in drop:
            (self.folder / name).unlink(missing_ok=True)
            sync(self.folder)
        self._made = []
        self.close()

    def swap(self, *, drop: Iterable[str] = ()) -> None:
        """Replace the folder by one with the files of ``staging`` and, but for ``drop``, those
        that it has, in one step. OSError where that is not possible; nothing has changed then."""
        self._sync_staged()
        kept = {entry for entry in self.folder.iterdir() if entry != self.staging}
        folders = sorted(entry.name for entry in kept if entry.is_dir() and not entry.is_symlink())
        if folders:
            raise OSError(errno.ENOTSUP, f"it has the folder {folders[0]!r}, expected files only")
        left_out = set(drop) | {entry.name for entry in self.staging.iterdir()}
        twin = Path(
            tempfile.mkdtemp(prefix=f".{self.folder.name}{UNFINISHED}", dir=self.folder.parent)
        )
        try:
            for entry in kept:
                if entry.name not in left_out:
                    os.link(entry, twin / entry.name, follow_symlinks=False)
            for entry in list(self.staging.iterdir()):
                os.link(entry, twin / entry.name)
            shutil.copymode(self.folder, twin)
            sync(twin)
            _exchange(twin, self.folder)
            sync(self.folder.parent)
        finally:
            shutil.rmtree(twin, ignore_errors=True)
        self._made = []
        self.close()

    def close(self) -> None:
        """Remove what was staged, and the folder where this save has made it for nothing."""
        if self._lock < 0:
            return
        shutil.rmtree(self.staging, ignore_errors=True)
        for made in self._made:
            try:
                made.rmdir()
            except OSError:  # something else is in it by now
                break
        os.close(self._lock)
        self._lock = -1

    def _sync_staged(self) -> None:
        for entry in self.staging.iterdir():
            sync(entry)
        sync(self.staging)


def locked(folder: Path, *, required: bool = False) -> int:
    """A handle of ``folder`` that has its lock, which the end of this process gives back.

    On a file system without such locks it has none, or with ``required`` there is an OSError.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise BlockingIOError(
            errno.EWOULDBLOCK, f"another save is writing into {str(folder)!r}; wait until it ends"
        ) from None
    except OSError:
        if required:
            os.close(handle)
            raise
    return handle


def _remove_leftovers(folder: Path) -> None:
    """Remove what a save into ``folder`` that was killed has left."""
    twins = folder.parent.glob(f".{escaped(folder.name)}{UNFINISHED}*")
    for left in [*folder.glob(f"{UNFINISHED}*"), *twins]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def escaped(name: str) -> str:
    """``name`` in a pattern of glob."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def make_like_new(path: Path, *, mode: int) -> None:
    """Give a temporary file, or folder, the mode of one that was made with ``mode``."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(mode & ~mask)


def _exchange(one: Path, other: Path) -> None:
    """Exchange two names in one step. OSError where the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        raise OSError(errno.ENOSYS, "this libc has no renameat2") from None
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
