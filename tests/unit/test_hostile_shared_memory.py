# SPDX-License-Identifier: Apache-2.0
"""Memory that was made before, or is a link, is not taken for that of the ranks."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspeed_autotp.native import operators

SLOT = 4096


@pytest.fixture
def file() -> Iterator[Path]:
    path = Path("/dev/shm", f"autotp-{secrets.randbits(62):016x}")
    yield path
    path.unlink(missing_ok=True)


def opened(file: Path, rank: int) -> str:
    """What opening raises, or an empty text."""
    library = operators.loaded()
    try:
        handle = library.shm_open(f"/{file.name}", rank, 2, SLOT)
    except RuntimeError as error:
        return str(error)
    library.shm_close(handle)
    return ""


def test_it_is_readable_by_its_user_alone_whatever_the_mask(file: Path) -> None:
    before = os.umask(0)
    try:
        handle = operators.loaded().shm_open(f"/{file.name}", 0, 2, SLOT)
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o7777 == 0o600
    operators.loaded().shm_close(handle)


def test_rank_0_takes_over_nothing_that_is_there(file: Path) -> None:
    file.touch(mode=0o600)
    assert "cannot be opened: File exists" in opened(file, 0)


def test_no_rank_follows_a_link(file: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    file.symlink_to(target)
    assert "cannot be opened: File exists" in opened(file, 0)
    assert "cannot be opened: " in opened(file, 1)
    assert target.read_bytes() == b"mine"


def test_others_join_neither_what_is_open_to_all_nor_what_has_another_size(file: Path) -> None:
    assert opened(file, 0) == ""
    assert opened(file, 1) == ""
    os.truncate(file, SLOT)
    assert "has 4096 bytes, expected" in opened(file, 1)
    file.unlink()
    assert opened(file, 0) == ""
    file.chmod(0o644)
    assert opened(file, 1) == "shared memory is open to another user"
