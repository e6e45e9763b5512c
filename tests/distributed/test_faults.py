# SPDX-License-Identifier: Apache-2.0
"""One rank that is killed, stopped, throws or falls out of step is one error on the others: a slice
of the table that ``make faults`` prints, of which that of the forward is long. Scripts that end in
any order, and a clock that is set, are none."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.faults.cell import GLOO, MEMORY, TIMEOUT, TRANSPORTS, Cell, cells
from tests.support.faults.client import FaultServer
from tests.support.faults.expected import Values, judged, values_of

IN_SUITE = {
    Cell("loop", "plan", "killed", GLOO),
    Cell("loop", "forward", "killed", MEMORY),
    Cell("loop", "forward", "stopped", MEMORY),
    Cell("loop", "forward", "repeats", MEMORY),
    Cell("loop", "forward", "skips", GLOO),
    Cell("exit", "nothing is closed", "none", MEMORY),
    Cell("exit", "at exit, model after its groups", "none", MEMORY),
    Cell("exit", "engine, nothing is closed", "none", GLOO),
}
CLOCK = Path(__file__).parents[1] / "support" / "faults" / "stepping_clock.c"


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer() as started:
        yield started


@pytest.fixture(scope="module")
def right(server: FaultServer) -> Values:
    """The values of a run without a fault."""
    return values_of(server.run(Cell("loop", "", "none", MEMORY)).ranks[0])


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, marks=() if cell in IN_SUITE else pytest.mark.long, id=str(cell))
        for cell in cells()
        if cell in IN_SUITE or cell.stage == "forward" or cell.way == "exit"
    ],
)
@pytest.mark.timeout(300)
def test_a_rank_with_a_fault_is_one_error_on_the_others(
    server: FaultServer, right: Values, cell: Cell
) -> None:
    found = server.run(cell)
    assert not judged(cell, found, right).wrong, [each.log for each in found.ranks]


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that steps the system's time where it is preloaded."""
    library = tmp_path_factory.mktemp("clock") / "stepping_clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, CLOCK, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def stepping(clock: Path) -> Iterator[FaultServer]:
    with FaultServer({"LD_PRELOAD": str(clock)}) as started:
        yield started


def test_the_clock_is_set_back_and_forward(clock: Path) -> None:
    script = "import time\nfor _ in range(5): print(time.time()); time.sleep(0.25)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"LD_PRELOAD": str(clock)},
        capture_output=True,
        text=True,
        check=True,
    )
    times = [float(line) for line in done.stdout.split()]
    assert max(times) - min(times) > 3000
    assert times != sorted(times)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.timeout(300)
def test_a_clock_that_is_set_changes_no_step(
    stepping: FaultServer, right: Values, transport: str
) -> None:
    found = stepping.run(cell := Cell("loop", "", "none", transport))
    assert not judged(cell, found, right).wrong


@pytest.mark.long
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.timeout(300)
def test_a_clock_that_is_set_ends_no_wait_early(stepping: FaultServer, transport: str) -> None:
    cell = Cell("loop", "forward", "stopped", transport)
    right = values_of(stepping.run(Cell("loop", "", "none", transport)).ranks[0])
    found = judged(cell, stepping.run(cell), right)
    assert not found.wrong
    assert found.seconds > TIMEOUT - 0.5
