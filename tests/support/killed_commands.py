# SPDX-License-Identifier: Apache-2.0
"""Ends ``autotp merge`` and ``autotp reshard`` by SIGKILL at moments spread over them.

    python -m tests.support.killed_commands CHECKPOINT 20

What they were to write is there and whole, or not there; the checkpoint is as it was; no process is
left; and the next run removes what a killed one has left. Every fourth moment is one of two
processes that work for a third. Last, Ctrl-C leaves nothing at all. The commands are forks of this
process, which has imported everything.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from deepspeed_autotp.cli.main import main as autotp

TIMEOUT = 120.0
COMMANDS = (("merge", "--max-file-gb", "0.004"), ("reshard", "--tp", "4"))


def main() -> None:
    checkpoint, moments = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)  # forks of a process with threads may hang
    before = contents(checkpoint)
    with tempfile.TemporaryDirectory(prefix="autotp-killed-") as root:
        for command, *more in COMMANDS:
            print(command, *kill_all(command, more, checkpoint, Path(root, command), moments))
    assert contents(checkpoint) == before


def kill_all(
    command: str, more: list[str], checkpoint: Path, root: Path, moments: int
) -> list[str]:
    """``new`` for each moment after which all was there, or else ``none``."""
    root.mkdir()
    out = root / "out"
    seconds, expected = {}, {}
    for jobs in (1, 2) if moments >= 4 else (1,):
        asked = [command, str(checkpoint), str(out), *more, "--jobs", str(jobs)]
        seconds[jobs] = run(asked, after=None)  # also with what the last killed one has left
        expected = contents(out)
        assert [path.name for path in root.iterdir()] == ["out"]
        remove(out)
    found = []
    for moment in range(moments):
        jobs = 2 if moment % 4 == 3 else 1
        asked = [command, str(checkpoint), str(out), *more, "--jobs", str(jobs)]
        run(asked, after=1.5 * seconds[jobs] * (moment + 0.5) / moments)
        assert not out.exists() or contents(out) == expected, moment
        found.append("new" if out.exists() else "none")
        if out.exists():
            remove(out)
    run([command, str(checkpoint), str(out), *more], after=None)
    assert contents(out) == expected
    assert [path.name for path in root.iterdir()] == ["out"]
    remove(out)
    jobs = max(seconds)
    asked = [command, str(checkpoint), str(out), *more, "--jobs", str(jobs)]
    run(asked, after=seconds[jobs] / 2, number=signal.SIGINT)
    assert [path.name for path in root.iterdir()] in ([], ["out"])
    return found


def run(asked: list[str], *, after: float | None, number: signal.Signals = signal.SIGKILL) -> float:
    """Run a command, ended after so many seconds; how many it took. No process of it is left."""
    process = multiprocessing.get_context("fork").Process(target=serve, args=(asked,))
    began = time.monotonic()
    process.start()
    assert process.pid is not None
    if after is not None:
        time.sleep(after)
        if number is signal.SIGINT and process.exitcode is None:  # as a terminal does
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
    process.join(TIMEOUT)
    taken = time.monotonic() - began
    ended = 130 if number is signal.SIGINT else -number
    assert process.exitcode in ((0,) if after is None else (0, ended)), process.exitcode
    while group_lives(process.pid):
        assert time.monotonic() - began < TIMEOUT, "a process is left"
        time.sleep(0.02)
    return taken


def serve(asked: list[str]) -> None:
    os.setsid()
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the bar, while this process lasts
    os._exit(autotp(asked))


def group_lives(group: int) -> bool:
    """Whether a process of the group has not ended; one that has may wait for its parent."""
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if fields[2] == str(group) and fields[0] != "Z":
            return True
    return False


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def remove(folder: Path) -> None:
    for file in sorted(folder.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    folder.rmdir()


if __name__ == "__main__":
    main()
