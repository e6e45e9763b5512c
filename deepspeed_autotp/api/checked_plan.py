# SPDX-License-Identifier: Apache-2.0
"""The first plan of a model, and what of it is checked: on its twin, or on the model itself."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from deepspeed_autotp._core import Plan
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.distributed.comparison import Compared, Values
from deepspeed_autotp.distributed.consensus import Agreement, Outcome
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.planning.agreed_plans import AgreedPlans
from deepspeed_autotp.planning.model_description import Description
from deepspeed_autotp.planning.planner import PlanRequest
from deepspeed_autotp.self_check.inferred_inputs import TrainingData
from deepspeed_autotp.self_check.inputs import Inputs, agreed_inputs
from deepspeed_autotp.self_check.self_check import SelfCheck
from deepspeed_autotp.self_check.twin import Twin, find_twin
from deepspeed_autotp.sharding.weight_location import WeightLocation

# A plan, and what of it has to be the same on all ranks.
_First = tuple[Plan, list[Compared]]


@dataclass(frozen=True, slots=True)
class CheckedPlan:
    """``plan`` is the first one. At most one of ``twin`` and ``inputs`` is there: what the
    self-check runs on, the second with the model's own weights. ``large_names`` as in a request."""

    plan: Plan
    twin: Twin | None
    inputs: Inputs | None
    large_names: tuple[str, ...] | None = None

    @property
    def is_checked(self) -> bool:
        """Whether there is a self-check."""
        return self.twin is not None or self.inputs is not None

    def checked(
        self,
        description: Description,
        settings: TPTrainingConfig,
        *,
        group: TPGroup,
        agreement: Agreement,
    ) -> tuple[Plan, PlanRequest]:
        """The plan that the self-check found to be right, or without one the first, and what it was
        asked for with; ValueError on every rank of ``agreement`` where none is right."""
        ranks, is_checked = group.size, self.is_checked
        plans = AgreedPlans(
            description,
            settings,
            ranks,
            agreement,
            is_checked=is_checked,
            large_names=self.large_names,
        )
        plan = self._right(description, plans, settings, group=group, agreement=agreement)
        return plan, plans.request_of(plan)

    def _right(
        self,
        description: Description,
        plans: AgreedPlans,
        settings: TPTrainingConfig,
        *,
        group: TPGroup,
        agreement: Agreement,
    ) -> Plan:
        if self.twin is not None:
            return self._on_twin(self.twin, plans, settings, group=group, agreement=agreement)
        if self.inputs is None:
            return plans.with_sequence_parallel() if settings.sequence_parallel else self.plan
        overlap = settings.overlaps
        check = SelfCheck(description, self.plan, group=group, overlap=overlap, agreement=agreement)
        return _run(check, self.inputs, plans, settings)

    def _on_twin(
        self,
        twin: Twin,
        plans: AgreedPlans,
        settings: TPTrainingConfig,
        *,
        group: TPGroup,
        agreement: Agreement,
    ) -> Plan:
        small = plans.of_twin(twin.description, self.plan)
        overlap = settings.overlaps
        check = SelfCheck(
            twin.description,
            twin.plan,
            group=group,
            overlap=overlap,
            agreement=agreement,
            runs=twin.runs,
        )
        try:
            found = _run(check, twin.inputs, small, settings)
        except ValueError as error:
            raise ValueError(
                f"{error} (seen in a small model of the same class and configuration; "
                "tensor_parallel.self_check: true checks the model itself)"
            ) from error
        return self.plan if found.hash == twin.plan.hash else plans.as_for(small, found)


def plan_to_check(
    description: Description,
    settings: TPTrainingConfig,
    given: Mapping[str, object] | None,
    data: TrainingData | None,
    *,
    ranks: int,
    agreement: Agreement,
    location: WeightLocation,
    on_twin: bool = True,
    large_names: tuple[str, ...] | None = None,
) -> Outcome[CheckedPlan]:
    """The first plan of the model, and what its self-check will run on, the same on every rank of
    ``agreement``; all ranks are told whether that is a twin, which it is only with ``on_twin``.
    ValueError on each of them, as of ``agreed_inputs``. ``large_names`` as in a request, for a
    model that stands for a larger one and has no twin."""

    plans = functools.partial(
        AgreedPlans, description, settings, ranks, agreement, large_names=large_names
    )
    first = None
    if on_twin and settings.self_check == "auto" and large_names is None:
        checked, is_given = plans(is_checked=True), given is not None
        with suppress(ValueError):  # said below, unless it is not so without a self-check
            first, twin = _first_and_twin(description, checked, location, is_given=is_given)
            if twin is not None:
                found = CheckedPlan(first[0], twin, None)
                return Outcome(found, [_there_is(True), *first[1]], True)
    inputs = agreed_inputs(
        description.modules[""],
        description,
        settings,
        given,
        agreement,
        location=location,
        data=data,
    )
    is_checked = inputs is not None
    if first is None or not is_checked:
        first = plans(is_checked=is_checked).first()
    plan, planned = first
    found = CheckedPlan(plan, None, inputs, large_names)
    return Outcome(found, [_there_is(is_checked), *planned], False)


def _first_and_twin(
    description: Description, plans: AgreedPlans, location: WeightLocation, *, is_given: bool
) -> tuple[_First, Twin | None]:
    """The first of ``plans``, and the twin where every rank that agrees about them has the same.
    There is none for ranks that are given inputs: all are told so where others are not."""

    def work() -> Outcome[tuple[_First, Twin | None]]:
        plan, planned = plans.first()

        def make_plan(small: Description) -> Plan:
            return plans.plan_of_twin(small, plan)

        twin = None if is_given else find_twin(description, plan, make_plan, location.device)
        return Outcome(((plan, planned), twin), told=None if twin is None else twin.plan.hash)

    (first, twin), hashes = plans.agreement.conclude(work)
    return first, twin if len(set(hashes)) == 1 else None


def _there_is(check: bool) -> Compared:
    return Values({"a self-check": str(check)}, "the self-check")


def _run(check: SelfCheck, inputs: Inputs, plans: AgreedPlans, settings: TPTrainingConfig) -> Plan:
    plan = check.run(
        inputs,
        replan=plans.make,
        rules_are_users=plans.rules_are_users,
        keep_logits=settings.vocab_parallel_lm_head is True,
    )
    if settings.sequence_parallel:
        plan = check.run_sequence_parallel(replan=plans.with_sequence_parallel)
    return plan
