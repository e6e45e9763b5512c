# SPDX-License-Identifier: Apache-2.0
"""Runs cells one after the other: ``python -m tests.support.faults.server`` reads them as JSON.

The ranks of a cell are forks of this process, which has imported everything and has no threads.
Each goes on as a program of its own, to the end of the interpreter.
"""

import faulthandler
import gc
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.support.faults.cell import FAULTY, RANKS, TIMEOUT, Cell

# Seconds beyond the timeout for ranks to end, on a machine that does other work.
MARGIN = 30.0
# Of a run that has no fault, or goes on with one.
LONGEST = 120.0
POLL = 0.01
_TRACEBACK = "Traceback (most recent call last)"
_CAUSED = "The above exception was the direct cause of the following exception"
# torch says the rank before each line.
_ERROR = re.compile(r"^(?:\[rank\d+\]: )?(?:[A-Za-z_]\w*\.)*([A-Z]\w*: .*)$")


@dataclass(slots=True)
class Ended:
    """How a rank has ended. ``seconds`` are from the fault on, None where there was none."""

    status: int | None  # as of a shell, negative for a signal, None for one that was ended here
    seconds: float | None
    error: str  # the last that its traceback says: the class, and its message
    errors: int  # that it has shown, each with those that caused it
    notes: list[list[Any]]
    log: str = field(repr=False)


@dataclass(slots=True)
class Found:
    """All ranks of a cell, and what they have left in /dev/shm."""

    ranks: list[Ended]
    left: list[str]
    unended: list[int]

    @staticmethod
    def of(text: str) -> "Found":
        found = json.loads(text)
        return Found([Ended(**each) for each in found["ranks"]], found["left"], found["unended"])


def main() -> None:
    _import_all()
    print(flush=True)
    for line in sys.stdin:
        cell, folder = Cell(**json.loads(line)), Path(tempfile.mkdtemp(prefix="autotp-faults-"))
        pids: list[int] = []
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                _serve(cell, rank, folder)
                return
            pids.append(pid)
        found = _watched(cell, pids, folder)
        shutil.rmtree(folder)
        print(json.dumps(asdict(found)), flush=True)


def _import_all() -> None:
    import deepspeed
    import torch
    import torch.distributed.nn
    import transformers.integrations.deepspeed  # noqa: F401

    import tests.support.faults.run  # noqa: F401

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from tests.support.pretrained_models import build_pretrained

    build_pretrained("llama")
    # Forks would copy the memory of all objects when they look at them.
    gc.collect()
    gc.freeze()


def _serve(cell: Cell, rank: int, folder: Path) -> None:
    """One rank, from which the fork goes on to its end."""
    from tests.support.faults.run import run

    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    run(cell, rank, folder)


def _watched(cell: Cell, pids: list[int], folder: Path) -> Found:
    """Wait for the ranks. One that is stopped goes on when the others have ended."""
    deadline = time.monotonic() + LONGEST
    fault = folder / "fault"
    ended: dict[int, tuple[int, float]] = {}
    was_continued = cell.fault != "stopped"
    while len(ended) < RANKS and time.monotonic() < deadline:
        for rank, pid in enumerate(pids):
            if rank not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                ended[rank] = os.waitstatus_to_exitcode(found[1]), time.monotonic()
        if not was_continued and len(ended) == RANKS - 1 and FAULTY not in ended:
            os.kill(pids[FAULTY], signal.SIGCONT)
            was_continued = True
        if fault.exists() and fault.stat().st_size:
            deadline = min(deadline, float(fault.read_text()) + TIMEOUT + MARGIN)
        time.sleep(POLL)
    unended = [rank for rank in range(RANKS) if rank not in ended]
    for rank in unended:
        _end(pids[rank])
    began = float(fault.read_text()) if fault.exists() else None
    ranks = [_found(folder, rank, ended.get(rank), began) for rank in range(RANKS)]
    return Found(ranks, _left(ranks), unended)


def _end(pid: int) -> None:
    """End a rank, which says before where it was."""
    os.kill(pid, signal.SIGCONT)
    os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _found(folder: Path, rank: int, ended: tuple[int, float] | None, began: float | None) -> Ended:
    log = (folder / f"{rank}.log").read_text(errors="replace")
    file = folder / f"{rank}.notes"
    notes = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    found = (_ERROR.match(line) for line in log.splitlines())
    errors = [each[1] for each in found if each is not None and "Warning" not in each[1]]
    return Ended(
        status=None if ended is None else ended[0],
        seconds=None if ended is None or began is None else ended[1] - began,
        error=errors[-1] if errors else "",
        errors=log.count(_TRACEBACK) - log.count(_CAUSED),
        notes=notes,
        log=log,
    )


def _left(ranks: list[Ended]) -> list[str]:
    """Files in /dev/shm that a rank of the run has named; any are removed."""
    names = {note[1] for rank in ranks for note in rank.notes if note[0] == "memory"}
    left = [name for name in sorted(names) if Path(f"/dev/shm{name}").exists()]
    for name in left:
        Path(f"/dev/shm{name}").unlink(missing_ok=True)
    return left


if __name__ == "__main__":
    main()
