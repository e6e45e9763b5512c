# SPDX-License-Identifier: Apache-2.0
"""How the shards of a checkpoint would be laid out at another TP size, without its model's weights.

The plan is made again, from what the checkpoint says that it was made of and from a model without
values. That this is the right model, and these the right rules, shows at the size of the
checkpoint: there the plan has to be the one that was saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from deepspeed_autotp._core import Plan
from deepspeed_autotp.checkpoint.layout import Layout
from deepspeed_autotp.checkpoint.metadata import Metadata, metadata_of
from deepspeed_autotp.checkpoint.model_config import config_source
from deepspeed_autotp.checkpoint.rank_files import CheckpointFiles
from deepspeed_autotp.checkpoint.unsharded import (
    is_unsharded,
    layout_of_files,
    layout_of_model,
    unsharded,
)
from deepspeed_autotp.interop.configured_model import configured_model
from deepspeed_autotp.planning.plan_recipe import default_recipe, plan_of


@dataclass(frozen=True, slots=True)
class Sizes:
    """The layouts of a checkpoint as it is, and at another size; ``metadata`` is that of the new
    one but for its optimizer, or None where it is unsharded."""

    old: Layout
    new: Layout
    metadata: Metadata | None


def layouts_at(folder: Path, metadata: Metadata | None, *, tp: int, config: Path | None) -> Sizes:
    """The layouts of the checkpoint in ``folder`` and at TP size ``tp``.

    ``config`` is a folder, or a file, with the configuration of the model, where it is not that
    beside the checkpoint.
    ValueError where they cannot be known.
    """
    source = config_source(folder, config)
    if metadata is None:
        return _of_unsharded(folder, source, tp=tp)
    if metadata.layout is None:
        raise _unknown(folder, tp, f"tensor_parallel.json has version {metadata.version}, which "
                       "says nothing of the shards")  # fmt: skip
    if tp == metadata.ranks:
        return Sizes(metadata.layout, metadata.layout, metadata)
    if tp == 1:
        return Sizes(metadata.layout, unsharded(metadata.layout), None)
    plan = _plan_of_saved(folder, source, metadata, metadata.layout, tp=tp)
    return Sizes(metadata.layout, Layout.of_plan(plan), metadata_of(plan, metadata.recipe))


def _of_unsharded(folder: Path, source: Path, *, tp: int) -> Sizes:
    files = CheckpointFiles(folder)
    if not is_unsharded(files):
        raise _unknown(folder, tp, "it has no tensor_parallel.json, as where DeepSpeed sharded it "
                       "by its own rules")  # fmt: skip
    model = _model(folder, source, None, tp=tp)
    known = layout_of_model(model)
    old = layout_of_files(files, known.ties)
    if tp == 1:
        return Sizes(old, known, None)
    recipe = default_recipe(model)
    assert recipe is not None
    plan = _planned(folder, recipe, model, ranks=tp, tp=tp)
    return Sizes(old, Layout.of_plan(plan), metadata_of(plan, recipe))


def _plan_of_saved(
    folder: Path, source: Path, metadata: Metadata, saved: Layout, *, tp: int
) -> Plan:
    """The plan for ``tp`` ranks, of a recipe that gives the saved one at its own size."""
    recipe = metadata.recipe
    if recipe is None:
        raise _unknown(folder, tp, "tensor_parallel.json does not say what the plan was made from, "
                       "as before version 4 and with rules that are no JSON")  # fmt: skip
    if recipe.get("model") is None:
        raise _unknown(folder, tp, "its model is not one of transformers without adapters")
    model = _model(folder, source, str(recipe["model"]), tp=tp)
    again = _planned(folder, recipe, model, ranks=metadata.ranks, tp=tp)
    if Layout.of_plan(again) != saved:
        difference = saved.difference(Layout.of_plan(again)) or "some weights are sharded otherwise"
        raise _unknown(
            folder,
            tp,
            f"the plan that is made from it for its own size is another one: {difference}",
        )
    return _planned(folder, recipe, model, ranks=tp, tp=tp)


def _planned(
    folder: Path, recipe: Mapping[str, Any], model: nn.Module, *, ranks: int, tp: int
) -> Plan:
    try:
        return plan_of(recipe, model, ranks=ranks)
    except ValueError as error:
        raise _unknown(folder, tp, f"there is no plan for {ranks} ranks: {error}") from error


def _model(folder: Path, source: Path, name: str | None, *, tp: int) -> nn.Module:
    try:
        return configured_model(source, name)
    except ValueError as error:
        more = ", name a folder that has it with --config" if source == folder else ""
        raise _unknown(folder, tp, f"{error}{more}") from error


def _unknown(folder: Path, tp: int, why: str) -> ValueError:
    return ValueError(
        f"--tp {tp}: how the model of {str(folder)!r} is sharded at that size is not known: {why}; "
        f"load the checkpoint itself with autotp_size {tp}, which reshards while loading"
    )
