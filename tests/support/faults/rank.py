# SPDX-License-Identifier: Apache-2.0
"""One rank of a run with a fault: what it notes, and where its fault is."""

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tests.support.faults.cell import FAULTY, GLOO, RANKS, TIMEOUT, Cell
from tests.support.memory_names import noting_memory

T = TypeVar("T")

# Of the calls of a point within a stage the one with the fault, so that others are in the middle.
FAULTY_CALL = 2


class Fault(RuntimeError):
    """What a rank that throws throws."""


class Rank:
    """Notes what it has come to in a file, and has the fault of ``cell`` where it is to."""

    def __init__(self, cell: Cell, rank: int, folder: Path) -> None:
        self.cell, self.rank, self.folder = cell, rank, folder
        self.is_faulty = rank == FAULTY and cell.fault != "none"
        self.stage = ""
        self._notes = (folder / f"{rank}.notes").open("w", buffering=1)
        self._left = FAULTY_CALL if cell.stage in ("self-check", "forward", "backward") else 1

    def note(self, what: str, *values: Any) -> None:
        self._notes.write(json.dumps([what, *values]) + "\n")

    def has(self, stage: str, *faults: str) -> bool:
        """Whether this rank has one of ``faults`` at a stage."""
        return self.is_faulty and self.cell.stage == stage and self.cell.fault in faults

    def called(self, stage: str, call: Callable[[], T], *, at_fault: bool = True) -> T | None:
        """The call of a stage, which may be left out or made twice; what happens within it is for
        the points."""
        if at_fault and self.has(stage, "skips"):
            self.begin()
            return None
        self.stage = stage if at_fault else ""
        if at_fault and self.has(stage, "repeats"):
            call()
            self.begin()
        result = call()
        self.stage = ""
        return result

    def is_due(self) -> bool:
        """Whether the call of a point is the one with the fault."""
        if not self.is_faulty or self.stage != self.cell.stage:
            return False
        self._left -= 1
        return self._left == 0

    def begin(self) -> None:
        """Note that the fault is now."""
        (self.folder / "fault.new").write_text(str(time.monotonic()))
        (self.folder / "fault.new").rename(self.folder / "fault")

    def strike(self) -> None:
        """End, stop or throw."""
        self.begin()
        if self.cell.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.cell.fault == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise Fault("a fault on purpose")

    def join(self) -> None:
        """Become a rank of a run, as a launcher would have it, and meet the others."""
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.rank),
            WORLD_SIZE=str(RANKS),
            LOCAL_WORLD_SIZE=str(RANKS),
            LOCAL_SIZE=str(RANKS),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT="1",  # not used: the ranks meet in a file
            AUTOTP_SHARED_MEMORY="0" if self.cell.transport == GLOO else "1",
        )
        torch.set_num_threads(1)
        store = dist.FileStore(str(self.folder / "store"), RANKS)  # type: ignore[attr-defined]
        dist.init_process_group(
            "gloo",
            store=store,
            rank=self.rank,
            world_size=RANKS,
            timeout=timedelta(seconds=TIMEOUT),
        )
        dist.barrier()

    def note_names(self, stack: ExitStack) -> None:
        """Note the names of shared memory that is made within ``stack``."""
        stack.enter_context(noting_memory(lambda name: self.note("memory", name)))
