# SPDX-License-Identifier: Apache-2.0
"""The C unit tests of the core under AddressSanitizer and UBSan, with failing allocations."""

import fcntl
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "core"
PROGRAMS = sorted(path.stem.removeprefix("test_") for path in FOLDER.glob("test_*.c"))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The processes of a test run share what is compiled; only one may build at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with Path(folder, "core-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_passes_under_the_sanitizers_also_without_memory(program: str) -> None:
    # A make that runs the tests hands its own flags down; they are not for this one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    with alone(FOLDER.parent.parent / "build"):
        done = subprocess.run(
            ["make", "--no-print-directory", "-C", str(FOLDER), "failing", f"TESTS={program}"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    if done.returncode != 0:
        pytest.fail(f"test_{program}.c:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    counted = re.search(rf"test_{program}\.c: (\d+) checks, 0 failed", done.stdout)
    assert counted is not None and int(counted[1]) > 0
    assert re.search(r"\d+ allocations failed, 0 of them in silence", done.stdout)


def test_there_are_programs_to_run() -> None:
    assert PROGRAMS
