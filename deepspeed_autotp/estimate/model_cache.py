# SPDX-License-Identifier: Apache-2.0
"""Records of models in files, so that a model is made once for many estimates.

A file is gzip around JSON, which has a checksum, and data alone. Whatever is wrong with one, or
with the folder, costs the time to make the model again: it is logged at debug level.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import re
import zlib
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from deepspeed_autotp.checkpoint.atomic_folder import UNFINISHED, write_atomically
from deepspeed_autotp.config.cache_folder import cache_folder
from deepspeed_autotp.estimate.changes import Changes
from deepspeed_autotp.estimate.model_record import ModelRecord
from deepspeed_autotp.interop.installed import Stamp, installed, stamp_of, stamps_of_makers
from deepspeed_autotp.interop.model_forms import config_file

_log = logging.getLogger("deepspeed_autotp")

# Files of other models than the last ones are removed.
_KEPT = 32
_ENDING = ".json.gz"
# Of a record, and of one that a process that was killed has not written to its end.
_NAMES = re.compile(rf"[0-9a-f]{{64}}{re.escape(_ENDING)}|{re.escape(UNFINISHED)}.*")


@dataclass(frozen=True, slots=True)
class _Content:
    """``key`` is in the name of the file, too; ``stamps`` are of the code that has made it."""

    format: Literal["deepspeed_autotp.model"]
    version: Literal[1]
    key: str
    stamps: tuple[Stamp, ...]
    model: ModelRecord


_CONTENT = TypeAdapter(_Content)


class ModelCache:
    """The records in ``folder``, which is made when there is something to write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def of_environment(cls) -> ModelCache | None:
        """That of the user, or of ``AUTOTP_CACHE``; None where it is off."""
        folder = cache_folder()
        return None if folder is None else cls(folder / "models")

    def entry(self, text: str, changes: Changes) -> CacheEntry:
        """The record of the model that ``text`` names, with ``changes``, as it is now."""
        return CacheEntry(self._folder, _key(text, changes))


class CacheEntry:
    """One record, which may not be there."""

    def __init__(self, folder: Path, key: str) -> None:
        self.key = key
        self._file = folder / f"{key}{_ENDING}"

    def read(self) -> ModelRecord | None:
        """None where there is none that could be used."""
        try:
            content = _CONTENT.validate_json(gzip.decompress(_read_own(self._file)), strict=True)
            content.model.data.model()
        except FileNotFoundError:
            return None
        except (OSError, EOFError, zlib.error, ValueError) as error:
            _log.debug("%s is not used: %s", self._file, error)
            return None
        if content.key != self.key or any(stamp_of(s[0]) != s for s in content.stamps):
            _log.debug("%s is not used: what it was made with has changed", self._file)
            return None
        with suppress(OSError):
            os.utime(self._file)  # the last ones that were used stay
        return content.model

    def write(self, record: ModelRecord) -> None:
        """Keep ``record``, if that is possible."""
        content = _Content("deepspeed_autotp.model", 1, self.key, tuple(stamps_of_makers()), record)
        folder = self._file.parent
        try:
            text = _CONTENT.dump_json(content)
            # Of names that are no Unicode another one would come back.
            if _CONTENT.validate_json(text, strict=True) != content:
                raise ValueError("it would not be read as it is")
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            data = gzip.compress(text, compresslevel=6, mtime=0)
            write_atomically(self._file, data, mode=0o600)
            _remove_old(folder)
        except (OSError, ValueError) as error:
            _log.debug("%s is not written: %s", self._file, error)


def _key(text: str, changes: Changes) -> str:
    parts = [text, _config_hash(text), astuple(changes), installed()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _config_hash(text: str) -> str | None:
    """None where there is none, or where making the model will say that it cannot be read."""
    file = config_file(text)
    with suppress(OSError):
        return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
    return None


def _read_own(file: Path) -> bytes:
    """The content of a file of this user. OSError for another one."""
    with file.open("rb") as opened:
        if os.fstat(opened.fileno()).st_uid != os.geteuid():
            raise PermissionError("it is the file of another user")
        return opened.read()


def _remove_old(folder: Path) -> None:
    """Keep the last ones that were used. What others have put into the folder stays."""
    found = []
    for file in folder.iterdir():
        if _NAMES.fullmatch(file.name):
            with suppress(OSError):  # another process has removed it
                found.append((file.stat().st_mtime_ns, file))
    for _, file in sorted(found)[:-_KEPT]:
        file.unlink(missing_ok=True)
