# SPDX-License-Identifier: Apache-2.0
"""The self-check: the sharded model against the full one, before any tensor is sharded.

A few tokens go through the full model and through the model with a view of its shard in the place
of every sharded weight, as in training: with labels where the model takes them, the logits sharded
where the plan says so, and everything random fixed. Outputs of the layers that have full outputs,
the model's outputs, its loss, and the gradients of two parameters of each pattern of names are
compared; the first module that differs is named. Where the user did not write the rule for it, it
is sharded layer by layer, or replicated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from deepspeed_autotp._core import Plan
from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.distributed.failure_barrier import (
    CollectiveMismatch,
    PeerFailed,
    failure_barrier,
)
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.transformers import other_modalities
from deepspeed_autotp.planning.model_description import Description
from deepspeed_autotp.self_check.compare import Comparison, Difference
from deepspeed_autotp.self_check.coverage import heuristic, idle, large_layers, never_ran
from deepspeed_autotp.self_check.fallback import Fallback, Replan
from deepspeed_autotp.self_check.inputs import Inputs
from deepspeed_autotp.self_check.isolation import drop_frames, isolated
from deepspeed_autotp.self_check.runs import Reference, Runs, Way
from deepspeed_autotp.self_check.trace import Dropout, Run, Trace
from deepspeed_autotp.self_check.view_errors import likely_counts
from deepspeed_autotp.sharding.conversion import Conversion

_log = logging.getLogger("deepspeed_autotp")

_UNCALLED = "a weight that is used without its layer's forward has to be full; {} never ran"


class SelfCheck:
    """Runs and compares; the model is as it was before, whatever happens.

    ``plan`` is the first one to be checked: what it shards says what is compared. ``runs`` are of
    both, and may have run the full model already.
    """

    def __init__(
        self,
        description: Description,
        plan: Plan,
        *,
        group: TPGroup,
        overlap: bool,
        agreement: Agreement,
        runs: Runs | None = None,
    ) -> None:
        self._model = description.modules[""]
        self._description = description
        self._first = plan
        self._group = group
        self._overlap = overlap
        self._agreement = agreement
        self._runs = runs or Runs(description, plan)
        self._full: Reference | None = None
        self._idle: list[str] = []
        self._keep_logits = False

    def run(
        self, inputs: Inputs, *, replan: Replan, rules_are_users: bool, keep_logits: bool
    ) -> Plan:
        """A plan under which the sharded model equals the full one: the first, or one in which the
        blocks that differed are sharded layer by layer, or replicated, and so are heuristic ones
        that did not run; not where the rules are the user's. Without a run there are no heuristics.
        Logits are gathered where that helps; ``keep_logits``: the user does not want that.

        ValueError on every rank when there is none. Nothing is compared where
        the full model cannot take inputs that were inferred, or its outputs are not finite, as with
        weights that are not loaded yet.
        """
        fallback, plan = Fallback(replan), self._first
        self._keep_logits = keep_logits
        with isolated(self._model, self._runs.device):
            full = self._full = self._run_full(inputs)
            if full is None:
                guessed = heuristic(plan) + large_layers(plan)
                unguessed = guessed and not rules_are_users
                return replan((), (), heuristics=False) if unguessed else plan
            if self._idle and not rules_are_users:
                fallback.replicate(self._idle)
                plan = fallback.plan()
            while found := self._wrong(plan, full, rules_are_users=rules_are_users):
                gathered = self._with_gathered_logits(full, fallback) if found.logits else None
                if gathered is not None:
                    if keep_logits:
                        raise ValueError(
                            f"tensor_parallel.vocab_parallel_lm_head: got true, but {found.text}; "
                            "leave the key out"
                        )
                    fallback.gather_logits(found)
                    plan = gathered
                elif rules_are_users or not found.block:
                    raise ValueError(found.text)
                else:
                    plan = fallback.plan_without(found)
        if self._agreement.is_first:
            for warning in fallback.warnings():
                _log.warning("%s", warning)
        return plan

    def run_sequence_parallel(self, *, replan: Callable[[Sequence[str]], Plan]) -> Plan:
        """A plan that also shards tokens, by ``replan``, which is told which blocks need all tokens
        up to their end: those that differ without. ValueError on every rank when there is none.
        Follows ``run``.
        """
        assert self._full is not None  # sequence_parallel insists on a self-check
        reasons: dict[str, str] = {}
        with isolated(self._model, self._runs.device):
            plan = replan(())
            first = found = self._check(plan, self._full)
            while found is not None:
                block = next((name for name in found.gathering if name not in reasons), None)
                if block is None or first is None:
                    break
                reasons[block] = found.text
                plan = replan(tuple(reasons))
                found = self._check(plan, self._full)
        if first is not None and found is not None:
            raise ValueError(
                "tensor_parallel.sequence_parallel: got true, but with the tokens sharded between "
                f"blocks {first.text}. Leave the key out"
            )
        if self._agreement.is_first:
            for block, reason in reasons.items():
                _log.warning(
                    "%s sums over all tokens and scatters its output, in the place of a "
                    "reduce-scatter: %s",
                    block,
                    reason,
                )
        return plan

    def _wrong(self, plan: Plan, full: Reference, *, rules_are_users: bool) -> Difference | None:
        """What is wrong with the plan, the same on every rank."""
        unused = None
        if not rules_are_users:
            parts, order = other_modalities(self._model), full.run.order()
            unused = never_ran(plan, self._description.modules, order, parts=parts)
        return self._check(plan, full, unused=unused)

    def _with_gathered_logits(self, full: Reference, fallback: Fallback) -> Plan | None:
        """The plan with gathered logits, if that one is right."""
        plan = fallback.plan(gather_logits=True)
        return plan if self._check(plan, full) is None else None

    def _run_full(self, inputs: Inputs) -> Reference | None:
        """The run of the full model, or None where there is nothing to compare with. ``_idle`` are
        the individually sharded layers that did not run in it."""
        problem = ""
        for found, problem in self._runs.attempts(inputs):
            order = [] if found is None else found.run.order()
            own = (problem, idle(self._first, self._description.modules, order))
            said = self._agreement.exchange(own)
            problems = [each for each, _ in said]
            if not any(problems):
                assert found is not None
                self._idle = said[0][1]
                self._warn_of_nothing(found.run)
                return found
            if not all(problems):
                break

        def refuse() -> None:
            if problem and (inputs.insist or not all(problems)):
                raise ValueError(
                    f"the self-check cannot run the model before it is sharded: {problem}; pass "
                    "example_inputs that it takes to initialize or parallelize, or set "
                    "tensor_parallel.self_check to false"
                )

        self._agreement.together(refuse)
        _log.info(
            "no self-check: %s does not run unsharded: %s", type(self._model).__name__, problem
        )
        return None

    def _warn_of_nothing(self, run: Run) -> None:
        if run.loss is None and not run.finals and self._agreement.is_first:
            _log.warning(
                "the self-check sees no tensor in the output of %s, and so compares inner layers "
                "and no gradient; return tensors, or a mapping, sequence or dataclass of them",
                type(self._model).__name__,
            )

    def _check(
        self, plan: Plan, full: Reference, *, unused: Difference | None = None
    ) -> Difference | None:
        """The first difference that the lowest rank with one sees, the same on every rank; where
        there is none, ``unused``, which this rank has found before."""
        conversion = Conversion(
            self._description, plan=plan, group=self._group, overlap=self._overlap
        )
        comparison = Comparison(plan, rank=self._group.rank, full=full.run, rounded=full.rounded)
        trace = self._runs.trace(full.way)
        found: Difference | None = None
        with self._runs.weights(full.way):
            try:
                found = self._compared(conversion, comparison, trace, full.way)
            except Exception as error:
                if isinstance(error, CollectiveMismatch):
                    found = Difference(f"the model runs other modules on each rank: {error}", ())
                elif not isinstance(error, PeerFailed):  # which has the words
                    hint = self._hint(trace.run, error, plan)
                    found = comparison.failure(trace.run, error, hint=hint)
                drop_frames(error)
            finally:
                conversion.undo()
        found = self._agreed(found, unused, comparison, trace.run)
        if found is not None:  # maybe in the middle of a collective
            self._group.recover()
        return found

    def _hint(self, run: Run, error: Exception, plan: Plan) -> str:
        """What the module that failed may need beside the plan."""
        name = run.running[-1] if run.running else ""
        local = {each.key for each in plan.integers if each.module == name}
        module = self._description.modules.get(name)
        return "" if module is None else likely_counts(module, error, local=local)

    def _compared(
        self, conversion: Conversion, comparison: Comparison, trace: Trace, way: Way
    ) -> Difference | None:
        with failure_barrier(self._group):
            conversion.switch()
            conversion.keep_logits(insist=self._keep_logits)
            conversion.swap_in_views()
            self._runs.go(trace, way)
        return comparison.first(trace.run)

    def _agreed(
        self, found: Difference | None, unused: Difference | None, comparison: Comparison, run: Run
    ) -> Difference | None:
        """What the lowest rank with a difference found, also in the RNG states of dropout. It may
        be due to layers that did not run, which are planned anew in any case."""
        said = self._agreement.exchange((found, unused, comparison.replicated_dropouts(run)))
        first = _of_lowest([each for each, *_ in said])
        if first is None:
            first = _other_dropout([each for *_, each in said], comparison)
        idle = _of_lowest([each for _, each, _ in said])
        if first is None or idle is None:
            return idle if first is None else first
        text = f"{first.text}; {_UNCALLED.format(', '.join(idle.block))}"
        return replace(idle, text=text, replicate=True)


def _of_lowest(ranks: list[Difference | None]) -> Difference | None:
    """That of the lowest rank with one."""
    failed = [(rank, each) for rank, each in enumerate(ranks) if each is not None]
    if not failed:
        return None
    _, first = failed[0]
    if len(failed) == len(ranks):
        return first
    names = ", ".join(str(rank) for rank, _ in failed)
    return replace(first, text=f"on rank {names} of {len(ranks)}: {first.text}")


def _other_dropout(ranks: list[dict[int, Dropout]], comparison: Comparison) -> Difference | None:
    """The first dropout of a replicated activation that differs between ranks."""
    for at, own in ranks[0].items():
        if any(at in each and each[at].rng != own.rng for each in ranks):
            return comparison.dropout(own.module)
    return None
