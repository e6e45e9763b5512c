# SPDX-License-Identifier: Apache-2.0
"""Models whose own plan is wrong in one block."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from deepspeed_autotp._core import index_pattern
from tests.support.log_records import logged_warnings
from tests.support.loss_curves import STEPS, single_losses, worst_difference
from tests.support.small_models import build

WRONG = {
    # gate and up give their shards to a replicated layer.
    "fails": ("llama", {"model.layers.*.mlp.down_proj": "replicate"}),
    # The rank's shard of gate has other features than its shard of up.
    "differs": ("llama", {"model.layers.*.mlp.gate_proj": "packed_colwise"}),
    # Each rank's heads give a partial sum of the gradient.
    "gradient": ("qwen3", {"model.layers.*.self_attn.q_norm": "replicate"}),
    # Nothing gathers the shards of the logits.
    "head": ("llama", {"lm_head": "colwise"}),
    # Experts whose gate and up are sharded along their input, which is replicated.
    "experts": ("mixtral", {"model.layers.*.mlp.experts.gate_up_proj": "rowwise"}),
}
_EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a model: its losses against one process, the warnings, the sharded layers, and
    the individually sharded ones among them."""

    apart: float
    warnings: list[str]
    layers: frozenset[str]
    individual: frozenset[str]


def wrong_model(kind: str) -> nn.Module:
    family, styles = WRONG[kind]
    more = _EXPERTS if family == "mixtral" else {}
    model = build(family, tied=False, **more)
    own: Mapping[str, str] = vars(model).get("_tp_plan") or {}
    vars(model)["_tp_plan"] = {**own, **styles}
    return model


def train_with_fallback(kind: str) -> Outcome:
    """Shard a model whose plan is wrong, train it, and compare it with one process."""
    expected = single_losses(wrong_model(kind), clip=0.0)
    model = wrong_model(kind)
    with logged_warnings() as warnings:
        deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    plan = deepspeed_autotp.tensor_parallel(model).plan
    losses = single_losses(model, clip=0.0, steps=STEPS)
    deepspeed_autotp.check_replicas(model)
    layers = frozenset(layer.module for layer in plan.layers)
    individual = frozenset(x.module for x in plan.layers if x.gather_output or x.split_input)
    return Outcome(worst_difference(losses, expected), warnings, layers, individual)


def refuse_everything() -> str:
    """The refusal of a model in which nothing is left to shard."""
    model = wrong_model("experts")
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    own: Mapping[str, str] = vars(model)["_tp_plan"]
    vars(model)["_tp_plan"] = {**own, **dict.fromkeys(map(index_pattern, layers), "replicate")}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    try:
        deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    except ValueError as error:
        after = model.state_dict()
        assert all(torch.equal(t, after[name]) for name, t in before.items())
        return str(error)
    return "not refused"
