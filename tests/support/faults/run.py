# SPDX-License-Identifier: Apache-2.0
"""What one rank of a cell does, from the meeting of the ranks to its end."""

from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from tests.support.faults import exits, points, stages
from tests.support.faults.cell import Cell
from tests.support.faults.rank import Rank


def run(cell: Cell, number: int, folder: Path) -> None:
    rank = Rank(cell, number, folder)
    rank.join()
    with ExitStack() as stack:
        rank.note_names(stack)
        points.put(rank, stack)
        {"loop": stages.loop, "engine": stages.engine, "exit": exits.run}[cell.way](rank)
    # There each rank comes to its end without waiting for the others.
    if cell.way == "exit" or cell.stage == "close":
        return
    rank.note("done")
    dist.barrier()
    dist.destroy_process_group()
