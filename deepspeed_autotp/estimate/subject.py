# SPDX-License-Identifier: Apache-2.0
"""The model that is estimated, and its plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deepspeed_autotp._core import Model, Plan
from deepspeed_autotp.config.tp_section import TPSection
from deepspeed_autotp.estimate.changes import Changes
from deepspeed_autotp.estimate.model_cache import ModelCache
from deepspeed_autotp.estimate.model_record import ModelRecord
from deepspeed_autotp.planning.model_data import Plannable, Style
from deepspeed_autotp.planning.planner import (
    PlanRequest,
    decided,
    large_names,
    make_plan,
    skips_all,
)

if TYPE_CHECKING:
    from torch import nn

    from deepspeed_autotp.estimate.live_model import LiveModel


@dataclass(frozen=True, slots=True)
class _Planned:
    """What a plan of a record is made of."""

    model: Model
    styles: tuple[Style, ...]


class Subject:
    """A model by the words that name it, and the section ``tensor_parallel`` of a configuration.

    ``record`` says what it is: from ``cache`` where it is there, or else from the model itself,
    which is made when it is first needed. ValueError for what names no model, or one that cannot be
    made.
    """

    def __init__(
        self,
        text: str,
        section: Mapping[str, Any],
        changes: Changes,
        *,
        cache: ModelCache | None = None,
    ) -> None:
        self.text = text
        self._section = section
        self._changes = changes
        self._made: LiveModel | None = None
        self.record = self._recorded(cache)
        self._planned = _Planned(self.record.data.model(), self.record.data.styles)
        self._plans: dict[int, Plan] = {}
        # As a run has it: without a self-check no large layer is sharded individually.
        self._request = PlanRequest(
            large_layers=section.get("self_check") is not False,
            sequence_parallel=section.get("sequence_parallel") is True,
        )

    def stacks(self) -> dict[str, list[str]]:
        """For each list of blocks, by name, the kinds of its blocks."""
        return {name: list(kinds) for name, kinds in self.record.stacks.items()}

    def build(self, layers: int | None) -> nn.Module:
        """A new model on the meta device, with all blocks or the first of each stack.

        ValueError for a number of blocks of a model that is not made of a configuration.
        """
        return self._live().build(layers)

    def plan(self, ranks: int) -> Plan | None:
        """The plan of the full model; None for one rank. ValueError where nothing can be
        sharded."""
        if ranks == 1:
            return None
        if ranks not in self._plans:
            settings = self._settings(ranks)
            skips = skips_all(self._planned.styles, lambda: self._planned, settings)
            self._plans[ranks] = make_plan(
                self._planned,
                settings,
                ranks=ranks,
                request=self._request,
                must_shard=not skips,
            )
        return self._plans[ranks]

    def plan_of(self, description: Plannable, ranks: int) -> Plan | None:
        """The plan of a model with fewer blocks, in which the same is large."""
        plan = self.plan(ranks)
        if plan is None:
            return None
        request = replace(self._request, large_names=large_names(plan))
        return make_plan(
            description,
            decided(self._settings(ranks), plan),
            ranks=ranks,
            request=request,
            must_shard=False,
        )

    def unsharded(self) -> Plan:
        """A plan for one rank, which holds everything."""
        if 1 not in self._plans:
            self._plans[1] = make_plan(self._planned, self._settings(1), ranks=1, must_shard=False)
        return self._plans[1]

    def _recorded(self, cache: ModelCache | None) -> ModelRecord:
        if cache is None:
            return self._live().record()
        entry = cache.entry(self.text, self._changes)
        found = entry.read()
        if found is None:
            found = self._live().record()
            # What was written to config.json meanwhile may not be what the model was made of.
            is_same = cache.entry(self.text, self._changes).key == entry.key
            if is_same and not self._live().is_of_factory:
                entry.write(found)
        return found

    def _live(self) -> LiveModel:
        # Only who needs the model itself waits for torch and transformers.
        from deepspeed_autotp.estimate.live_model import LiveModel

        if self._made is None:
            self._made = LiveModel(self.text, self._changes)
        return self._made

    def _settings(self, ranks: int) -> TPSection:
        return TPSection(**{**self._section, "autotp_size": ranks})
