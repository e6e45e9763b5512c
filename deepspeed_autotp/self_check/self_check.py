# SPDX-License-Identifier: Apache-2.0
"""The self-check: the sharded model against the full one, before any tensor is sharded.

A few tokens go through the full model and through the model with a view of its shard in the place
of every sharded weight. Outputs of the layers that have full outputs, the model's outputs, and the
gradients of two parameters of each pattern of names are compared; the first module that differs is
named. Where the user did not write the rule for it, it is sharded layer by layer, or replicated.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from deepspeed_autotp._core import Plan
from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.distributed.failure_barrier import (
    CollectiveMismatch,
    PeerFailed,
    failure_barrier,
)
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.transformers import other_modalities, output_tensors
from deepspeed_autotp.planning.model_description import Description
from deepspeed_autotp.self_check.compare import Comparison, Difference
from deepspeed_autotp.self_check.coverage import heuristic, idle, large_layers, never_ran
from deepspeed_autotp.self_check.fallback import Fallback, Replan
from deepspeed_autotp.self_check.inputs import Inputs
from deepspeed_autotp.self_check.isolation import drop_frames, fix_rng, isolated
from deepspeed_autotp.self_check.trace import Run, Trace
from deepspeed_autotp.sharding.conversion import Conversion

_log = logging.getLogger("deepspeed_autotp")

# The gradient of a full weight is formed for the comparison; above this size it is left out.
_LARGEST_GRADIENT = 1 << 26


class SelfCheck:
    """Runs and compares; the model is as it was before, whatever happens.

    ``plan`` is the first one to be checked: what it shards says what is compared.
    """

    def __init__(
        self,
        model: nn.Module,
        description: Description,
        plan: Plan,
        *,
        group: TPGroup,
        overlap: bool,
    ) -> None:
        self._model = model
        self._description = description
        self._group = group
        self._overlap = overlap
        self._device = description.parameters[0].device
        self._full: Run | None = None
        self._exits = {layer.module for layer in plan.layers if layer.has_full_output}
        self._sampled = [
            index
            for index in plan.samples
            if not plan.entries[index].is_tied
            and description.parameters[index].requires_grad
            and description.parameters[index].numel() <= _LARGEST_GRADIENT
        ]

    def run(
        self,
        inputs: Inputs,
        plan: Plan,
        *,
        replan: Replan | None,
        agreement: Agreement,
    ) -> Plan:
        """A plan under which the sharded model equals the full one: ``plan``, or with ``replan``
        one in which the blocks that differed are sharded layer by layer, or replicated, and so are
        heuristic ones that did not run. Without a run there are no heuristics.

        ValueError on every rank of ``agreement`` when there is none. Nothing is compared where
        the full model cannot take inputs that were inferred, or its outputs are not finite, as with
        weights that are not loaded yet.
        """
        fallback = Fallback()
        parts = other_modalities(self._model)
        with isolated(self._model, self._device):
            full = self._full = self._run_full(inputs, agreement)
            if full is None and replan is not None and heuristic(plan) + large_layers(plan):
                return replan((), (), heuristics=False)
            if full is not None and replan is not None:
                plan = self._without_idle(plan, full, fallback, replan, agreement)
            while full is not None:
                found = self._check(inputs.values, plan, full, agreement)
                if found is None and replan is not None:
                    own = never_ran(plan, self._description.modules, full.order(), parts=parts)
                    found = _agreed(own, agreement)
                if found is None:
                    break
                if replan is None or not found.block:
                    raise ValueError(found.text)
                plan = fallback.plan_without(found, replan)
        if agreement.is_first:
            for warning in fallback.warnings():
                _log.warning("%s", warning)
        return plan

    def check_sequence_parallel(self, inputs: Inputs, plan: Plan, *, agreement: Agreement) -> Plan:
        """``plan``, which also shards tokens; or a ValueError on every rank. Follows ``run``."""
        assert self._full is not None  # sequence_parallel insists on a self-check
        with isolated(self._model, self._device):
            found = self._check(inputs.values, plan, self._full, agreement)
        if found is not None:
            raise ValueError(
                "tensor_parallel.sequence_parallel: got true, but with the tokens sharded between "
                f"blocks {found.text}. Leave the key out"
            )
        return plan

    def _without_idle(
        self, plan: Plan, full: Run, fallback: Fallback, replan: Replan, agreement: Agreement
    ) -> Plan:
        """The plan without the individually sharded layers that did not run."""
        own = idle(plan, self._description.modules, full.order())
        names: list[str] = agreement.exchange(own)[0]
        if not names:
            return plan
        fallback.replicate(names)
        return replan(names, ())

    def _run_full(self, inputs: Inputs, agreement: Agreement) -> Run | None:
        """The run of the full model, or None where there is nothing to compare with."""
        trace = self._trace()
        try:
            self._pass(trace, inputs.values)
            finite = all(bool(t.isfinite().all()) for t in trace.run.finals)
            problem = "" if finite else "its outputs are not finite"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        problems = agreement.exchange(problem)
        if not any(problems):
            self._warn_of_nothing(trace.run, agreement)
            return trace.run

        def refuse() -> None:
            if problem and (inputs.insist or not all(problems)):
                raise ValueError(
                    f"the self-check cannot run the model before it is sharded: {problem}; pass "
                    "example_inputs that it takes to initialize or parallelize, or set "
                    "tensor_parallel.self_check to false"
                )

        agreement.together(refuse)
        _log.info(
            "no self-check: %s does not run unsharded: %s", type(self._model).__name__, problem
        )
        return None

    def _warn_of_nothing(self, run: Run, agreement: Agreement) -> None:
        if not run.finals and agreement.is_first:
            _log.warning(
                "the self-check sees no tensor in the output of %s, and so compares inner layers "
                "and no gradient; return tensors, or a mapping, sequence or dataclass of them",
                type(self._model).__name__,
            )

    def _check(
        self, inputs: Mapping[str, object], plan: Plan, full: Run, agreement: Agreement
    ) -> Difference | None:
        """The first difference that the lowest rank with one sees, the same on every rank."""
        conversion = Conversion(
            self._description, plan=plan, group=self._group, overlap=self._overlap
        )
        comparison = Comparison(plan, rank=self._group.rank, full=full)
        trace = self._trace()
        found: Difference | None = None
        try:
            with failure_barrier(self._group):
                conversion.switch()
                conversion.swap_in_views()
                try:
                    self._pass(trace, inputs)
                except (PeerFailed, CollectiveMismatch):
                    raise
                except Exception as error:
                    found = comparison.failure(trace.run, error)
                    raise
            found = comparison.first(trace.run)
        except Exception as error:
            if isinstance(error, CollectiveMismatch):
                found = Difference(f"the model runs other modules on each rank: {error}", ())
            elif found is None and not isinstance(error, PeerFailed):  # which has the words
                found = Difference(str(error), ())
            drop_frames(error)
        finally:
            conversion.undo()
        found = _agreed(found, agreement)
        if found is not None:  # maybe in the middle of a collective
            self._group.recover()
        return found

    def _trace(self) -> Trace:
        return Trace(self._description.modules, exits=self._exits)

    def _pass(self, trace: Trace, inputs: Mapping[str, object]) -> None:
        """Forward and backward."""
        parameters = {i: self._description.parameters[i] for i in self._sampled}
        fix_rng(self._device)
        # What a module keeps of one run, as a recurrent state, is no input of the next.
        with isolated(self._model, self._device), torch.enable_grad(), trace:
            trace.run.finals = output_tensors(self._model(**inputs))
            trace.differentiate(parameters)


def _agreed(found: Difference | None, agreement: Agreement) -> Difference | None:
    said = agreement.exchange(found)
    failed = [(rank, each) for rank, each in enumerate(said) if each is not None]
    if not failed:
        return None
    _, first = failed[0]
    if len(failed) == len(said):
        return first
    names = ", ".join(str(rank) for rank, _ in failed)
    return replace(first, text=f"on rank {names} of {len(said)}: {first.text}")
