# SPDX-License-Identifier: Apache-2.0
"""What ``make faults`` takes for wrong."""

import math
from typing import Any

import pytest

from tests.support.faults.cell import GLOO, Cell
from tests.support.faults.expected import judged
from tests.support.faults.server import Ended, Found

LOSSES = {(step, "loss"): 4.0 + step for step in range(3)}
RIGHT = LOSSES | {(step, "norm"): 2.0 + step for step in range(3)}
LOST = "RanksLost: a collective of a TP group failed on rank 0 on host, with rank 1 on host: ..."
TOO_FAR = "RuntimeError: the tensors are on different devices; expected all on one GPU"


def well(**changed: float) -> Ended:
    """A rank that ends well, with values such as ``loss_1``."""
    values = {f"{what}_{step}": value for (step, what), value in RIGHT.items()} | changed
    notes: list[Any] = [
        [what, step, values[f"{what}_{step}"]] for step in range(3) for what in ("loss", "norm")
    ]
    return Ended(0, 1.0, "", 0, [*notes, ["done"]], "")


def failed(error: str, errors: int = 1) -> Ended:
    return Ended(1, 1.0, error, errors, [], "Traceback")


def wrong(stage: str, fault: str, *ranks: Ended, way: str = "loop") -> str:
    return judged(Cell(way, stage, fault, GLOO), Found(list(ranks), [], []), RIGHT).wrong


NAN = {"loss_1": math.nan, "norm_1": math.nan, "loss_2": math.nan, "norm_2": math.nan}


def test_a_nan_is_on_all_ranks_in_the_same_step() -> None:
    assert not wrong("forward", "nan", well(**NAN), well(**NAN))
    assert "nan on rank 0, 5.0 on rank 1" in wrong("forward", "nan", well(**NAN), well())
    later = NAN | {"loss_1": 5.0}
    assert not wrong("backward", "nan", well(**later), well(**later))
    assert "norm of step 1 is nan" in wrong(
        "backward", "nan", well(**later), well(**later | {"norm_1": 3.0})
    )


def test_a_nan_that_no_rank_sees_is_wrong() -> None:
    assert "finite, expected NaN" in wrong("step", "nan", well(), well())
    assert "expected 4.0" in wrong("step", "nan", well(loss_0=9.0), well(loss_0=9.0))


def test_a_nan_in_the_configuration_is_an_error() -> None:
    said = failed("ValueError: the configuration differs between the ranks:")
    assert not wrong("merge", "nan", said, said, way="engine")
    assert "expected an error" in wrong("merge", "nan", well(), well(), way="engine")


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (failed(LOST), ""),
        (failed(TOO_FAR), "different devices"),
        (failed(LOST, errors=2), "2 errors, expected one"),
        (well(), "expected an error"),
    ],
)
def test_a_fault_is_one_error_that_names_it(rank: Ended, said: str) -> None:
    found = wrong("forward", "killed", rank, Ended(-9, 1.0, "", 0, [], ""))
    assert said in found and bool(found) == bool(said)


def test_a_rank_that_ends_well_has_come_to_its_end() -> None:
    early = well()
    early.notes.pop()
    assert "before its end" in wrong("", "none", well(), early)
