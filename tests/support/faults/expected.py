# SPDX-License-Identifier: Apache-2.0
"""What the other ranks are to be told, by stage and fault, and whether they were."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tests.support.faults.cell import FAULTY, FAULTY_STEP, GLOO, STEPS, Cell
from tests.support.faults.server import Ended, Found

# How an error begins that names what has happened.
_CLEAR = re.compile(
    "|".join(
        (
            r"(RanksLost|PeerLost): a collective of .* failed on rank \d",
            r"\w+: collective mismatch: rank \d ",
            r"\w+: collective mismatch: the ranks agree on different things, rank \d ",
            r"\w+: the ranks \[0, 1\] are in one TP group of \w+ but are at different calls of it",
            r"\w+: the ranks made different plans:",
            r"\w+: the configuration differs between the ranks:",
            r"\w+: the model cannot run with this plan: .*: one of the ranks .* did not reach a ",
            r"\w+: on rank \d of \d: ",
            r"\w+: \w+: some rank did not call it within the timeout ",
            r"\w+: load_checkpoint: the ranks find different checkpoints: ",
        )
    )
)
# What a run that ends well does not say, also not when the interpreter ends.
_COMPLAINS = re.compile(r"Traceback|Exception ignored|terminate called|Fatal Python error")

# Losses and norms of gradients, by step and "loss" or "norm", in the order of a run.
Values = Mapping[tuple[int, str], float]
# What first is not finite where one rank alone has NaN in a stage. DeepSpeed calls the norm
# infinite, and leaves out a step in which only the gradients have it.
_FIRST_NAN = {
    "forward": (FAULTY_STEP, "loss"),
    "backward": (FAULTY_STEP, "norm"),
    "step": (FAULTY_STEP, "norm"),
    "save": (STEPS, "loss"),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """``wrong`` says what is wrong with a cell, and is empty where nothing is; ``error`` is what a
    survivor was told, and ``seconds`` when the last of them had ended."""

    wrong: str
    error: str
    seconds: float


def judged(cell: Cell, found: Found, right: Values) -> Verdict:
    """``right`` has the values of a run without a fault."""
    others = [each for rank, each in enumerate(found.ranks) if rank != FAULTY]
    wrong = [f"ranks {found.unended} hang"] if found.unended else []
    wrong += [f"{found.left} is left in /dev/shm"] if found.left else []
    if cell.fault != "none" and all(each.seconds is None for each in found.ranks):
        wrong.append("the fault did not come")
    wrong += _wrong_values(cell, [values_of(each) for each in found.ranks], right)
    if _goes_on(cell):
        wrong += [said for each in found.ranks for said in _wrong_good_end(each)]
    else:
        wrong += [said for each in others for said in _wrong_error(cell, each, found)]
    if cell.way != "exit" and cell.stage != "close":
        early = [each for each in found.ranks if each.status == 0 and ["done"] not in each.notes]
        wrong += ["a rank ends well before its end"] * len(early)
    seconds = max((each.seconds or 0.0 for each in others), default=0.0)
    first = others[0]
    error = first.error or (f"exit status {first.status}" if first.status else "")
    return Verdict("; ".join(wrong), error, seconds)


def values_of(rank: Ended) -> Values:
    """What a rank has noted."""
    return {(note[1], note[0]): note[2] for note in rank.notes if note[0] in ("loss", "norm")}


def _wrong_values(cell: Cell, ranks: list[Values], right: Values) -> list[str]:
    """All ranks have the right values up to a NaN, and the same ones from there on."""
    first = _FIRST_NAN.get(cell.stage) if cell.fault == "nan" else None
    wrong = [
        f"rank {rank}: the {key[1]} of step {key[0]} is {value}, expected {right[key]}"
        for rank, values in enumerate(ranks)
        for key, value in values.items()
        if (first is None or key < first) and not math.isclose(value, right[key], rel_tol=1e-5)
    ]
    if first is not None and any(math.isfinite(values.get(first, 0.0)) for values in ranks):
        wrong.append(f"the {first[1]} of step {first[0]} is finite, expected NaN")
    for step, what in sorted(set.intersection(*(set(values) for values in ranks))):
        one, other = (values[step, what] for values in ranks)
        if one != other and not (math.isnan(one) and math.isnan(other)):
            wrong.append(f"the {what} of step {step} is {one} on rank 0, {other} on rank 1")
    return wrong


def _goes_on(cell: Cell) -> bool:
    """Whether all ranks end well: without a fault, and where all see a NaN alike. One in the
    configuration makes that differ between them."""
    return cell.fault == "none" or (cell.fault == "nan" and cell.stage != "merge")


def _wrong_good_end(rank: Ended) -> list[str]:
    said = [f"exit status {rank.status}, {rank.error!r}"] if rank.status != 0 else []
    return said + ([rank.log] if _COMPLAINS.search(rank.log) else [])


def _wrong_error(cell: Cell, rank: Ended, found: Found) -> list[str]:
    """What is wrong with the end of a rank beside the faulty one: it has one error, or may go on
    where a plan that failed in the self-check was given up for another, which is said, and where
    each rank closes its own."""
    if rank.status == 0:
        said = "the model cannot run with this plan"
        is_planned_anew = cell.stage == "self-check" and any(said in x.log for x in found.ranks)
        may_end_well = is_planned_anew or cell.stage == "close"
        return [] if may_end_well else ["a rank ends well, expected an error"]
    if _is_ended_by_gloo(cell, rank):
        return []
    wrong = [] if _CLEAR.match(rank.error) else [f"exit status {rank.status}, {rank.error!r}"]
    return wrong + ([f"{rank.errors} errors, expected one"] if rank.errors != 1 else [])


def _is_ended_by_gloo(cell: Cell, rank: Ended) -> bool:
    """Whether gloo itself has ended a rank which was sent another number of bytes."""
    return cell.transport == GLOO and "op.preamble.length <= op.nbytes" in rank.log
