# SPDX-License-Identifier: Apache-2.0
"""The trial: the sharded model against the whole one, before any tensor is cut.

A few tokens go through the model whole and through the model with every cut weight lent as a
view. Outputs of the layers that give whole outputs, the model's outputs, and the gradients of
two parameters of each kind are compared; the first module that differs is named. Where nobody
wrote the rule for it, its layers are cut one by one, or else it is left whole.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from deepspeed_autotp import interop
from deepspeed_autotp._core import Plan
from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.distributed.failure_barrier import (
    CollectiveMismatch,
    PeerFailed,
    failure_barrier,
)
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.planning.model_description import Description
from deepspeed_autotp.self_check.compare import Comparison, Difference
from deepspeed_autotp.self_check.coverage import heuristic, idle, individual, never_ran
from deepspeed_autotp.self_check.fallback import Again, Exempt
from deepspeed_autotp.self_check.inputs import Inputs
from deepspeed_autotp.self_check.isolation import forget, same_numbers, untouched
from deepspeed_autotp.self_check.trace import Seen, Watch
from deepspeed_autotp.sharding.conversion import Conversion

_log = logging.getLogger("deepspeed_autotp")

# A gradient as large as the weight is formed for the comparison; above this it is left out.
_LARGEST_GRADIENT = 1 << 26


class Trial:
    """Runs and compares; the model is as it was before, whatever happens.

    ``plan`` is the first one to be tried: what it cuts says what is looked at.
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
        self._seen: Seen | None = None
        self._exits = {layer.module for layer in plan.layers if layer.has_full_output}
        self._watched = [
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
        again: Again | None,
        agreement: Agreement,
    ) -> Plan:
        """The plan that makes the sharded model the whole one: ``plan``, or with ``again`` one in
        which the blocks that differed are cut layer by layer, or left whole, and so are those that
        were guessed and did not run. Without a run nothing is guessed.

        ValueError on every rank of ``agreement`` when there is none. Nothing is compared where
        the whole model cannot take inputs that were only guessed, or its outputs are not finite,
        as with weights that are not loaded yet.
        """
        left = Exempt()
        parts = interop.other_modalities(self._model)
        with untouched(self._model, self._device):
            whole = self._seen = self._whole(inputs, agreement)
            if whole is None and again is not None and heuristic(plan) + individual(plan):
                return again((), (), heuristics=False)
            if whole is not None and again is not None:
                plan = self._without_idle(plan, whole, left, again, agreement)
            while whole is not None:
                found = self._check(inputs.values, plan, whole, agreement)
                if found is None and again is not None:
                    own = never_ran(plan, self._description.modules, whole.order(), parts=parts)
                    found = _agreed(own, agreement)
                if found is None:
                    break
                if again is None or not found.block:
                    raise ValueError(found.text)
                plan = left.plan_without(found, again)
        if agreement.is_first:
            for warning in left.warnings():
                _log.warning("%s", warning)
        return plan

    def confirm(self, inputs: Inputs, plan: Plan, *, agreement: Agreement) -> Plan:
        """``plan``, which cuts tokens, too; or a ValueError on every rank. Follows ``run``."""
        assert self._seen is not None  # who asks for it insists on a trial
        with untouched(self._model, self._device):
            found = self._check(inputs.values, plan, self._seen, agreement)
        if found is not None:
            raise ValueError(
                "tensor_parallel.sequence_parallel is true, but with a part of the tokens between "
                f"blocks {found.text}. Leave the key out"
            )
        return plan

    def _without_idle(
        self, plan: Plan, whole: Seen, left: Exempt, again: Again, agreement: Agreement
    ) -> Plan:
        """The plan without layers that are cut by themselves and that nothing was seen of."""
        own = idle(plan, self._description.modules, whole.order())
        names: list[str] = agreement.exchange(own)[0]
        if not names:
            return plan
        left.leave_whole(names)
        return again(names, ())

    def _whole(self, inputs: Inputs, agreement: Agreement) -> Seen | None:
        """The run of the whole model, or None where there is nothing to compare with."""
        watch = self._watch()
        try:
            self._pass(watch, inputs.values)
            finite = all(bool(t.isfinite().all()) for t in watch.seen.finals)
            problem = "" if finite else "its outputs are not finite"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        problems = agreement.exchange(problem)
        if not any(problems):
            self._warn_of_nothing(watch.seen, agreement)
            return watch.seen

        def refuse() -> None:
            if problem and (inputs.insist or not all(problems)):
                raise ValueError(f"the trial cannot run the model, which is whole yet: {problem}")

        agreement.together(refuse)
        _log.info("no trial: %s cannot be run whole: %s", type(self._model).__name__, problem)
        return None

    def _warn_of_nothing(self, seen: Seen, agreement: Agreement) -> None:
        if not seen.finals and agreement.is_first:
            _log.warning(
                "the trial sees no tensor in the output of %s, and so compares inner layers and no "
                "gradient; return a tensor, or a mapping, sequence or dataclass with tensors",
                type(self._model).__name__,
            )

    def _check(
        self, inputs: Mapping[str, object], plan: Plan, whole: Seen, agreement: Agreement
    ) -> Difference | None:
        """The first difference that the lowest rank with one sees, the same on every rank."""
        conversion = Conversion(
            self._description, plan=plan, group=self._group, overlap=self._overlap
        )
        comparison = Comparison(plan, rank=self._group.rank, whole=whole)
        watch = self._watch()
        found: Difference | None = None
        try:
            with failure_barrier(self._group):
                conversion.switch()
                conversion.lend()
                try:
                    self._pass(watch, inputs)
                except (PeerFailed, CollectiveMismatch):
                    raise
                except Exception as error:
                    found = comparison.failure(watch.seen, error)
                    raise
            found = comparison.first(watch.seen)
        except Exception as error:
            if isinstance(error, CollectiveMismatch):
                found = Difference(f"the model takes another way on each rank: {error}", ())
            elif found is None and not isinstance(error, PeerFailed):  # which has the words
                found = Difference(str(error), ())
            forget(error)
        finally:
            conversion.undo()
        found = _agreed(found, agreement)
        if found is not None:  # maybe in the middle of a collective
            self._group.recover()
        return found

    def _watch(self) -> Watch:
        return Watch(self._description.modules, exits=self._exits)

    def _pass(self, watch: Watch, inputs: Mapping[str, object]) -> None:
        """Forward and backward."""
        parameters = {i: self._description.parameters[i] for i in self._watched}
        same_numbers(self._device)
        # What a module keeps of one run, as a recurrent state, is no input of the next.
        with untouched(self._model, self._device), torch.enable_grad(), watch:
            watch.seen.finals = interop.output_tensors(self._model(**inputs))
            watch.differentiate(parameters)


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
