# SPDX-License-Identifier: Apache-2.0
"""``autotp merge`` and ``reshard`` that are killed, interrupted or given a full disk."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.killed_commands_ranks import fails_for_want_of_a_process, save
from tests.support.autotp_command import command
from tests.support.small_disk import mounted_disk
from tests.support.worker_pool import Pool


@pytest.fixture(scope="module")
def checkpoint(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 20 MB."""
    folder = tmp_path_factory.mktemp("run")
    pool.run(save, str(folder), ranks=2)
    return folder


@pytest.mark.long
def test_a_killed_command_leaves_all_or_nothing(checkpoint: Path) -> None:
    """``make kill-commands`` has twenty moments."""
    moments = "20" if os.environ.get("AUTOTP_KILL_COMMANDS") else "3"
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.killed_commands", str(checkpoint), moments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stdout)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    with mounted_disk(tmp_path, size="1m") as disk:
        yield disk


@pytest.mark.parametrize(
    "asked",
    ["merge --jobs 1", "reshard --tp 1 --jobs 1", "reshard --tp 4 --jobs 2"],
)
def test_a_full_disk_keeps_what_is_there(
    pool: Pool, checkpoint: Path, small_disk: Path, asked: str
) -> None:
    name, *more = asked.split()
    (small_disk / "other").write_bytes(b"mine")
    arguments = (name, str(checkpoint), str(small_disk / "out"), *more)
    status, _, errors = pool.run(command, *arguments, ranks=1)[0]
    assert status == 2
    assert "No space left on device" in errors or "bytes are free on the disk" in errors
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_a_process_that_is_killed_is_an_error(pool: Pool, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, errors, left = pool.run(
        fails_for_want_of_a_process, str(checkpoint), str(out), ranks=1
    )[0]
    assert status == 2
    assert "a process ended with the exit code -9, expected 0" in errors
    assert left == []
    assert list(tmp_path.iterdir()) == []
