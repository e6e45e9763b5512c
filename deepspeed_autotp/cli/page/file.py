# SPDX-License-Identifier: Apache-2.0
"""The file of a page: whether it can be written is known before anything is computed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from deepspeed_autotp.checkpoint.atomic_folder import write_atomically


def writable_file(text: str) -> Path:
    """The file to write; what a link names in the place of the link. ValueError where there can
    be none."""
    given, file = f"--html: got {text!r}", Path(text).resolve()
    folder = file.parent
    if not folder.is_dir():
        raise ValueError(f"{given}, but there is no folder {str(folder)!r}; make it first")
    if file.exists() and not file.is_file():
        raise ValueError(f"{given}, which is no file, expected the name of one, such as plan.html")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{given}, but {str(folder)!r} cannot be written to; name another place")
    return file


def write_file(file: Path, text: str) -> None:
    """Replace the file in one step. ValueError where the system does not let it."""
    try:
        write_atomically(file, text.encode())
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise ValueError(
            f"--html: {str(file)!r} cannot be written ({reason}); name another place"
        ) from error
