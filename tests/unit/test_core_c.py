# SPDX-License-Identifier: Apache-2.0
"""The C unit tests of the core under AddressSanitizer and UBSan, with failing allocations; the
kept inputs of its fuzz targets; and its threads."""

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
TARGETS = sorted(path.stem.removeprefix("fuzz_") for path in FOLDER.glob("fuzz/fuzz_*.c"))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The processes of a test run share what is compiled; only one may build at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with Path(folder, "core-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make(*arguments: str) -> str:
    """What ``make`` prints in the folder of the C tests; fails the test where it fails."""
    # A make that runs the tests hands its own flags down; they are not for this one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    with alone(FOLDER.parent.parent / "build"):
        done = subprocess.run(
            ["make", "--no-print-directory", "-C", str(FOLDER), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    if done.returncode != 0:
        pytest.fail(f"make {' '.join(arguments)}:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    return done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_passes_under_the_sanitizers_also_without_memory(program: str) -> None:
    printed = make("failing", f"TESTS={program}")
    counted = re.search(rf"test_{program}\.c: (\d+) checks, 0 failed", printed)
    assert counted is not None and int(counted[1]) > 0
    assert re.search(r"\d+ allocations failed, 0 of them in silence", printed)


@pytest.mark.parametrize("target", TARGETS)
def test_the_kept_inputs_of_a_fuzz_target_pass_under_the_sanitizers(target: str) -> None:
    printed = make("replay", "SANITIZE=1", f"TARGETS={target}")
    assert re.search(rf"{target}\.hex: [1-9]\d* inputs replayed", printed)


def test_threads_do_not_race() -> None:
    assert len(re.findall(r"[1-9]\d* checks, 0 failed", make("tsan"))) == 3


def test_there_are_programs_to_run() -> None:
    assert PROGRAMS and TARGETS
