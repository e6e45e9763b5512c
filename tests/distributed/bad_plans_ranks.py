# SPDX-License-Identifier: Apache-2.0
"""Models whose own plans cannot be followed."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from tests.support.log_records import logged_warnings
from tests.support.loss_curves import single_losses, worst_difference
from tests.support.model_snapshot import refusal
from tests.support.small_models import build


def make(
    family: str, tied: bool, styles: Mapping[str, str], changes: Mapping[str, Any]
) -> nn.Module:
    """A model whose own plan also has ``styles``."""
    model = build(family, tied=tied, **changes)
    vars(model)["_tp_plan"] = {**(vars(model).get("_tp_plan") or {}), **styles}
    return model


def refused(
    family: str,
    tied: bool,
    styles: Mapping[str, str],
    changes: Mapping[str, Any],
    specs: list[dict[str, Any]],
) -> str:
    """What is raised; the model is as it was."""
    model = make(family, tied, styles, changes)
    config = {"partition_config": {"layer_specs": specs}} if specs else {}
    ranks = dist.get_world_size()
    return refusal(model, lambda: deepspeed_autotp.parallelize(model, tp_size=ranks, config=config))


def warned(
    family: str,
    tied: bool,
    styles: Mapping[str, str],
    changes: Mapping[str, Any],
    specs: list[dict[str, Any]],
) -> tuple[list[str], float]:
    """What is warned of, and the worst difference of a loss to one process."""
    expected = single_losses(make(family, tied, styles, changes), clip=0.0)
    model = make(family, tied, styles, changes)
    config = {"partition_config": {"layer_specs": specs}} if specs else {}
    with logged_warnings() as texts:
        deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=config)
    return texts, worst_difference(single_losses(model, clip=0.0), expected)
