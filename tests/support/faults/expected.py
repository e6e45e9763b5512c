# SPDX-License-Identifier: Apache-2.0
"""What the other ranks are to be told, by stage and fault, and whether they were."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tests.support.faults.cell import FAULTY, GLOO, Cell
from tests.support.faults.server import Ended, Found

# What an error says that names what has happened.
_CLEAR = re.compile(
    r"^(RanksLost|PeerLost): .*failed on rank|^RuntimeError: collective mismatch: rank \d|"
    r"at different calls of it|did not call it within the timeout|on rank \d of \d: |"
    r"differ(ent|s)? |did not reach"
)
# What a run that ends well does not say, also not when the interpreter ends.
_COMPLAINS = re.compile(r"Traceback|Exception ignored|terminate called|Fatal Python error")
# Faults that all ranks see alike, with which a run goes on.
_ENDS_WELL = ("nan", "none")


@dataclass(frozen=True, slots=True)
class Verdict:
    """``wrong`` says what is wrong with a cell, and is empty where nothing is; ``error`` is what a
    survivor was told, and ``seconds`` when the last of them had ended."""

    wrong: str
    error: str
    seconds: float


def judged(cell: Cell, found: Found, losses: Mapping[int, float]) -> Verdict:
    """``losses`` are those of a run without a fault, by step."""
    others = [each for rank, each in enumerate(found.ranks) if rank != FAULTY]
    wrong = [f"ranks {found.unended} hang"] if found.unended else []
    wrong += [f"{found.left} is left in /dev/shm"] if found.left else []
    if cell.way == "engine" and (cell.stage, cell.fault) == ("step", "nan"):
        losses = losses_of(found)  # DeepSpeed leaves that step out, on all ranks
    for rank, each in enumerate(found.ranks):
        wrong += [f"rank {rank}: {said}" for said in _wrong_losses(cell, each, losses)]
    if cell.fault != "none" and all(each.seconds is None for each in found.ranks):
        wrong.append("the fault did not come")
    if cell.fault == "none":
        wrong += [f"exit status {each.status}" for each in found.ranks if each.status != 0]
        wrong += [each.log for each in found.ranks if _COMPLAINS.search(each.log)]
    for each in others:
        if each.status == 0 and not _may_end_well(cell, found):
            wrong.append("a rank ends well, expected an error")
        if each.status != 0 and not _CLEAR.search(each.error) and not _is_ended_by_gloo(cell, each):
            wrong.append(f"exit status {each.status}, {each.error!r}")
    seconds = max((each.seconds or 0.0 for each in others), default=0.0)
    first = others[0]
    error = first.error or (f"exit status {first.status}" if first.status else "")
    return Verdict("; ".join(wrong), error, seconds)


def _is_ended_by_gloo(cell: Cell, rank: Ended) -> bool:
    """Whether gloo itself has ended a rank which was sent another number of bytes."""
    return cell.transport == GLOO and "op.preamble.length <= op.nbytes" in rank.log


def _may_end_well(cell: Cell, found: Found) -> bool:
    """Whether the others may go on: where all ranks see a fault alike, where a plan that failed in
    the self-check was given up for another, which is said, and where each rank closes its own."""
    said = "the model cannot run with this plan"
    is_planned_anew = cell.stage == "self-check" and any(said in each.log for each in found.ranks)
    return cell.fault in _ENDS_WELL or is_planned_anew or cell.stage == "close"


def losses_of(found: Found) -> dict[int, float]:
    """The losses of a run, by step."""
    return {step: value for what, step, value in _losses(found.ranks[0])}


def _losses(rank: Ended) -> list[tuple[str, int, float]]:
    return [(note[0], note[1], note[2]) for note in rank.notes if note[0] == "loss"]


def _wrong_losses(cell: Cell, rank: Ended, losses: Mapping[int, float]) -> list[str]:
    return [
        f"the loss of step {step} is {value}, expected {losses[step]}"
        for _, step, value in _losses(rank)
        if not math.isclose(value, losses[step], rel_tol=1e-5)
        and not (cell.fault == "nan" and math.isnan(value))
    ]
