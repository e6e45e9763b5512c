# SPDX-License-Identifier: Apache-2.0
"""Many cases on a pool of ranks; what fails is made smaller while it still fails."""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.support.prove.case import Case
from tests.support.prove.compare import Outcome, begin_case, finish_case, run_case
from tests.support.prove.contradictions import settle
from tests.support.prove.drawing import is_plainer, plainer
from tests.support.worker_pool import Pool, PoolError

TIMEOUT = 60.0
COMPILE_TIMEOUT = 300.0
# A failing case is tried in at most so many smaller ones.
TRIES = 80


@dataclass(frozen=True, slots=True)
class Verdict:
    """``kind``: same, blind, refused, differs, unstable, or error, as where ranks do not agree."""

    kind: str
    text: str
    share: float = 1.0
    warnings: tuple[str, ...] = ()

    @property
    def is_failure(self) -> bool:
        return self.kind in ("differs", "error")


def verdict(pool: Pool, case: Case) -> Verdict:
    try:
        outcomes = outcomes_of(pool, case)
    except PoolError as error:
        return Verdict("error", _brief(str(error)))
    first = outcomes[0]
    if any((each.kind, each.text) != (first.kind, first.text) for each in outcomes):
        if all(each.kind == first.kind == "differs" for each in outcomes):
            return Verdict("differs", first.text, first.share, first.warnings)
        texts = [f"rank {rank}: {each.kind} {each.text}" for rank, each in enumerate(outcomes)]
        return Verdict("error", "the ranks do not agree: " + "\n".join(texts))
    share = max(each.share for each in outcomes)
    return Verdict(first.kind, first.text, share, first.warnings)


def outcomes_of(pool: Pool, case: Case) -> list[Outcome]:
    """Of each rank; what goes on from a checkpoint does so in new groups, which may be larger."""
    timeout = COMPILE_TIMEOUT if case.compiled else TIMEOUT
    ranks = case.tp * case.replicas
    outcomes: list[Outcome]
    with tempfile.TemporaryDirectory() as folder:
        if not case.resume:
            outcomes = pool.run(run_case, case, folder, ranks=ranks, timeout=timeout)
            return outcomes
        begun = pool.run(begin_case, case, folder, ranks=ranks, timeout=timeout)
        if any(outcome.kind != "same" for outcome, _ in begun):
            return [outcome for outcome, _ in begun]
        share, curves = begun[0][0].share, [curve for _, curve in begun]
        ranks = case.resume * case.replicas
        outcomes = pool.run(finish_case, case, folder, curves, share, ranks=ranks, timeout=timeout)
        return outcomes


def _brief(text: str) -> str:
    """What was raised, and where in the package or in torch, transformers and DeepSpeed."""
    lines = text.split("\n")
    files = [line.strip() for line in lines if line.strip().startswith("File ")]
    return "\n".join([*lines[:12], *files[-8:]])


def reason(text: str) -> str:
    """A refusal without the names and sizes of its case."""
    text = re.sub(r"'[^']*'", "'...'", text.split("\n")[0])
    text = re.sub(r"\b[\w*]+(\.[\w*]+)+\b", "NAME", text)
    return re.sub(r"\d+", "N", text)[:160]


def same_fault(one: Verdict, other: Verdict) -> bool:
    """Both differ, or both are the same kind of error."""
    if one.kind != other.kind or not one.is_failure:
        return False
    return one.kind == "differs" or _error(one) == _error(other)


def _error(found: Verdict) -> str:
    raised = re.search(r"raised (\w+)|did not answer|died|do not agree", found.text)
    return raised.group(0) if raised else ""


def shrunk(
    judge: Callable[[Case], Verdict], case: Case, found: Verdict, tries: int = TRIES
) -> tuple[Case, Verdict]:
    """The plainest case with the same fault that one field after the other leads to."""
    last = None
    while last != case:
        last = case
        for name, value in plainer(case):
            other = settle(replace(case, **{name: value}))
            if other == case or tries == 0 or not is_plainer(case, name, value):
                continue
            tries -= 1
            again = judge(other)
            if same_fault(found, again):
                case, found = other, again
    return case, found
