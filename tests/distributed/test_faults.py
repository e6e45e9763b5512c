# SPDX-License-Identifier: Apache-2.0
"""One rank that is killed, stopped, throws or falls out of step is one error on the others: a slice
of the table that ``make faults`` prints, of which that of the forward is long."""

from collections.abc import Iterator

import pytest

from tests.support.faults.cell import GLOO, MEMORY, Cell, cells
from tests.support.faults.client import FaultServer
from tests.support.faults.expected import judged, losses_of

IN_SUITE = {
    Cell("loop", "plan", "killed", GLOO),
    Cell("loop", "forward", "killed", MEMORY),
    Cell("loop", "forward", "stopped", MEMORY),
    Cell("loop", "forward", "repeats", MEMORY),
    Cell("loop", "forward", "skips", GLOO),
}


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer() as started:
        yield started


@pytest.fixture(scope="module")
def losses(server: FaultServer) -> dict[str, dict[int, float]]:
    """Those of runs without a fault, by way and step; made where they are asked for."""
    return {}


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, marks=() if cell in IN_SUITE else pytest.mark.long, id=str(cell))
        for cell in cells()
        if cell in IN_SUITE or cell.stage == "forward"
    ],
)
@pytest.mark.timeout(300)
def test_a_rank_with_a_fault_is_one_error_on_the_others(
    server: FaultServer, losses: dict[str, dict[int, float]], cell: Cell
) -> None:
    if cell.way not in losses:
        losses[cell.way] = losses_of(server.run(Cell(cell.way, "", "none", MEMORY)))
    found = server.run(cell)
    assert not judged(cell, found, losses[cell.way]).wrong, [each.log for each in found.ranks]
