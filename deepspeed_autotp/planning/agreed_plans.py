# SPDX-License-Identifier: Apache-2.0
"""Plans that every rank makes for itself, and that are the same on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from deepspeed_autotp._core import Plan, index_pattern
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.distributed.comparison import Compared, Planned
from deepspeed_autotp.distributed.consensus import Agreement, Outcome
from deepspeed_autotp.interop.peft import refuse_kinds, unsupported_adapters
from deepspeed_autotp.interop.transformers import drops_layers
from deepspeed_autotp.planning.model_description import Description
from deepspeed_autotp.planning.planner import PlanRequest, decided, large_names, make_plan
from deepspeed_autotp.planning.quantized_weights import refuse_quantized


def _refuse_adapters(description: Description, plan: Plan) -> None:
    """ValueError for adapters on sharded layers that would not be right there."""
    refuse_kinds(description.modules[""])
    for name, kind in unsupported_adapters(description.modules[""]).items():
        if any(e.is_sharded and e.name.startswith(f"{name}.") for e in plan.entries):
            raise ValueError(
                f"'{name}' has an adapter that is not plain LoRA ({kind}), and its layer is "
                "sharded: use LoRA without variants, or leave the layer replicated with "
                "partition_type 'skip' in tensor_parallel.partition_config"
            )


def _refuse_dropped_layers(description: Description, plan: Plan) -> None:
    for stack in plan.stacks:
        if drops_layers(description.modules[stack.owner]):
            raise ValueError(
                f"tensor_parallel.sequence_parallel: got true, but '{stack.owner}' drops layers in "
                "training, among them those that shard and gather the tokens; set its layerdrop to "
                "0, or leave the key out"
            )


def _refuse_beside_auto_ep(description: Description, plan: Plan) -> None:
    """ValueError where AutoEP would replace a module that the plan changes, and for a shard of
    which some rank counts nothing in the gradient norm: AutoEP would average its gradient over such
    ranks."""
    parts = [name.rpartition(".") for name in description.replaced_later]
    for name in (*plan.region_blocks, *(layer.module for layer in plan.layers)):
        pattern = index_pattern(name)
        if any(pattern == block and f"{name}.{p}" in description.modules for block, _, p in parts):
            raise ValueError(
                f"expert_parallel: got a rule that shards '{name}' itself, which AutoEP replaces, "
                "expected rules for what is in it; write 'skip' for it in "
                "tensor_parallel.partition_config, or leave expert_parallel out"
            )
    for entry in plan.entries:
        counted = [entry.is_counted(rank) for rank in range(plan.ranks)]
        if entry.is_sharded and not entry.is_tied and not all(counted):
            raise ValueError(
                f"expert_parallel: got {plan.ranks} TP ranks, of which {counted.count(False)} hold "
                f"no part of {entry.name} for themselves alone, expected a part for each: AutoEP "
                "would average its gradient over these; use a TP size that is at most the number "
                "of key/value heads"
            )


class AgreedPlans:
    """Makes plans of one model, each of them on every rank of ``agreement`` and compared there.

    ``is_checked``: a self-check follows. Without one there are heuristics only where the user
    switched it off, and no large layers are sharded individually: only a run shows that they can.
    ``large_names`` as in a request.
    """

    def __init__(
        self,
        description: Description,
        settings: TPTrainingConfig,
        ranks: int,
        agreement: Agreement,
        *,
        is_checked: bool,
        large_names: tuple[str, ...] | None = None,
    ) -> None:
        self._description = description
        self._settings = settings
        self._ranks = ranks
        self.agreement = agreement
        self._first = PlanRequest(
            replicated=description.replaced_later,
            heuristics=is_checked or settings.self_check is False,
            large_layers=is_checked,
            large_names=large_names,
        )
        self._last = self._first
        self._requests: dict[str, PlanRequest] = {}
        self.rules_are_users = settings.get_partition_config_object() is not None

    def first(self) -> tuple[Plan, list[Compared]]:
        """The plan of the rules alone, and what has to be the same on all ranks, not compared yet;
        ValueError where there is none. It is what the self-check starts from."""
        plans = [self._own(self._first)]
        if self._settings.sequence_parallel:  # refused before the self-check where it cannot be
            plans.append(self._own(replace(self._first, sequence_parallel=True)))
        return plans[0], [self.compared(plan) for plan in plans]

    def request_of(self, plan: Plan) -> PlanRequest:
        """What ``plan``, one of these, was asked for with."""
        return self._requests.get(plan.hash, self._first)

    def compared(self, plan: Plan) -> Compared:
        """``plan`` as it has to be on every rank."""
        return Planned(plan, self._traits())

    def make(
        self,
        replicated: Sequence[str] = (),
        individual: Sequence[str] = (),
        *,
        heuristics: bool = True,
        gather_logits: bool = False,
    ) -> Plan:
        """ValueError on every rank where one cannot plan, or plans otherwise than another."""
        first = self._first
        request = replace(
            first,
            replicated=(*first.replicated, *replicated),
            individual=tuple(individual),
            heuristics=heuristics and first.heuristics,
            large_layers=heuristics and first.large_layers,
            gather_logits=gather_logits,
        )
        return self.again(request)

    def as_for(self, small: AgreedPlans, found: Plan) -> Plan:
        """As ``found``, the last one of a small model that stands for this one. ValueError where it
        has another form here."""
        sharded = self._settings.sequence_parallel
        names = self._first.large_names
        plan = self.again(replace(small._last, large_names=names, sequence_parallel=sharded))
        if problem := plan.form_difference(found):
            raise ValueError(
                "the self-check found blocks to replicate in a small model of the same class and "
                f"configuration, but in the model itself that does not do the same ({problem}); "
                "set tensor_parallel.self_check to true"
            )
        return plan

    def of_twin(self, description: Description, plan: Plan) -> AgreedPlans:
        """Those of a small model with this description; ``plan`` is that of the large one."""
        return AgreedPlans(
            replace(description, replaced_later=self._description.replaced_later),
            decided(self._settings, plan),
            self._ranks,
            self.agreement,
            is_checked=True,
            large_names=large_names(plan),
        )

    def plan_of_twin(self, description: Description, plan: Plan) -> Plan:
        """The first of them, not compared with those of other ranks."""
        small = self.of_twin(description, plan)
        return small._own(small._first)

    def with_sequence_parallel(self, all_tokens: Sequence[str] = ()) -> Plan:
        """As the last one, with the tokens sharded between blocks; ``all_tokens`` as in a
        PlanRequest. ValueError as above."""
        request = replace(self._last, sequence_parallel=True, all_tokens=tuple(all_tokens))
        return self.again(request)

    def again(self, request: PlanRequest) -> Plan:
        """The plan that ``request`` comes to. ValueError as of ``make``."""
        self._last = request

        def work() -> Outcome[Plan]:
            plan = self._own(request)
            return Outcome(plan, [self.compared(plan)])

        return self.agreement.conclude(work)[0]

    def _traits(self) -> list[str]:
        return [_traits(parameter) for parameter in self._description.parameters]

    def _own(self, request: PlanRequest) -> Plan:
        plan = make_plan(self._description, self._settings, ranks=self._ranks, request=request)
        _refuse_dropped_layers(self._description, plan)
        self._requests[plan.hash] = request
        if self._description.replaced_later:
            _refuse_beside_auto_ep(self._description, plan)
        _refuse_adapters(self._description, plan)
        refuse_quantized(self._description, plan)
        return plan


def _traits(parameter: nn.Parameter) -> str:
    """What of a parameter has to be the same on all ranks and is not in the plan."""
    return f"{parameter.dtype} {'trains' if parameter.requires_grad else 'frozen'}"


def compared(settings: TPTrainingConfig) -> dict[str, str]:
    """What all ranks have to be given alike, by the name of the field.

    Process groups differ between ranks by nature.
    """
    values = {
        f"tensor_parallel.{key}": str(value)
        for key, value in settings
        if key not in ("tensor_parallel", "dtype")
    }
    values["tensor_parallel.tp_grain_size"] = str(settings.tensor_parallel.tp_grain_size)
    return values
