# SPDX-License-Identifier: Apache-2.0
"""The model that is estimated: made on the meta device as often as it is needed, and its plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from deepspeed_autotp._core import Plan
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.estimate.step_recorder import block_kind, stacks_of
from deepspeed_autotp.interop.model_changes import enable_checkpointing, with_lora
from deepspeed_autotp.interop.named_model import named_model
from deepspeed_autotp.interop.small_config import is_configured, small_model, with_layers
from deepspeed_autotp.planning.model_description import Description, describe
from deepspeed_autotp.planning.planner import PlanRequest, large_names, make_plan, skips_all


@dataclass(frozen=True, slots=True)
class Changes:
    """What a run does to the model before it is sharded. ``lora`` are arguments of LoraConfig."""

    dtype: torch.dtype | None = None
    checkpointing: bool = False
    lora: Mapping[str, Any] | None = None


class Subject:
    """A model by the words that name it, and the section ``tensor_parallel`` of a configuration.

    ValueError for what names no model, or one that cannot be made.
    """

    def __init__(self, text: str, section: Mapping[str, Any], changes: Changes) -> None:
        self.text = text
        self._section = section
        self._changes = changes
        self._base = named_model(text, dtype=changes.dtype)
        self.dtype = next((p.dtype for p in self._base.parameters()), torch.float32)
        if changes.checkpointing:
            enable_checkpointing(self._base)
        self._full = self._base if changes.lora is None else self.build(None)
        self.description = describe(self._full)
        self._plans: dict[int, Plan] = {}
        # As a run has it: without a self-check no large layer is sharded individually.
        self._request = PlanRequest(large_layers=section.get("self_check") is not False)

    @property
    def model(self) -> nn.Module:
        """The full model; not to be changed."""
        return self._full

    @property
    def trains(self) -> list[bool]:
        """By entry of a plan, whether the parameter is trained."""
        return [parameter.requires_grad for parameter in self.description.parameters]

    def stacks(self) -> dict[str, list[str]]:
        """For each list of blocks, by name, the kinds of its blocks."""
        return {n: [block_kind(b) for b in s] for n, s in stacks_of(self._full).items()}

    def build(self, layers: int | None) -> nn.Module:
        """A new model on the meta device, with all blocks or the first of each stack.

        ValueError for a number of blocks of a model that is not made of a configuration.
        """
        base = self._base
        if is_configured(base):
            config = base.config if layers is None else with_layers(base, layers)
            made = small_model(base, config, device="meta").to(self.dtype)
        elif layers is None:
            made = named_model(self.text, dtype=self._changes.dtype)
        else:
            raise ValueError("the model is not made of a configuration")
        return made if self._changes.lora is None else with_lora(made, self._changes.lora)

    def plan(self, ranks: int) -> Plan | None:
        """The plan of the full model; None for one rank. ValueError where nothing can be
        sharded."""
        if ranks == 1:
            return None
        if ranks not in self._plans:
            settings = self._settings(ranks)
            must_shard = not skips_all(self._full, settings)
            self._plans[ranks] = make_plan(
                self.description,
                settings,
                ranks=ranks,
                request=self._request,
                must_shard=must_shard,
            )
        return self._plans[ranks]

    def plan_of(self, description: Description, ranks: int) -> Plan | None:
        """The plan of a model with fewer blocks, in which the same is large."""
        plan = self.plan(ranks)
        if plan is None:
            return None
        request = replace(self._request, large_names=large_names(plan))
        return make_plan(
            description, self._settings(ranks), ranks=ranks, request=request, must_shard=False
        )

    def unsharded(self) -> Plan:
        """A plan for one rank, which holds everything."""
        if 1 not in self._plans:
            self._plans[1] = make_plan(
                self.description, self._settings(1), ranks=1, must_shard=False
            )
        return self._plans[1]

    def _settings(self, ranks: int) -> TPTrainingConfig:
        return TPTrainingConfig(**{**self._section, "autotp_size": ranks})
