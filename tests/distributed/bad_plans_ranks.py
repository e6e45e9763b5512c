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
from tests.support.small_models import build, tokens


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


def refused_for_weight_norm(older: bool) -> str:
    """What a rule for the lengths of normed rows raises, of either kind of weight norm."""
    made = nn.utils.weight_norm if older else nn.utils.parametrizations.weight_norm
    model = build("llama", tied=False)
    made(model.get_submodule("model.layers.0.mlp.up_proj"))
    pattern = r".*up_proj\.(weight_g|parametrizations\.weight\.original0)$"
    spec = {"patterns": [pattern], "partition_type": "column"}
    config = {"partition_config": {"layer_specs": [spec]}}
    return refusal(model, lambda: deepspeed_autotp.parallelize(model, tp_size=2, config=config))


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


_LAYER = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise",
    "self_attn.q_norm": "replicated_with_grad_allreduce",
    "self_attn.k_norm": "replicated_with_grad_allreduce",
    "mlp.gate_proj": "colwise",
    "mlp.up_proj": "colwise",
    "mlp.down_proj": "rowwise",
}


class SmallTower(nn.Module):
    """A language model of 8 heads whose embeddings a tower of 3 heads adds to."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}
        self.main = build("qwen3", tied=False)
        self.tower = build("qwen3", tied=False, head_dim=8, **sizes).get_submodule("model")
        for layer in self.tower.get_submodule("layers").children():
            vars(layer.get_submodule("self_attn"))["num_heads"] = 3
        self.joint = nn.Linear(24, 64)
        self._tp_plan = {
            f"{where}.layers.*.{name}": style
            for where in ("main.model", "tower")
            for name, style in _LAYER.items()
        }

    def forward(self, input_ids: Any, labels: Any = None) -> Any:
        embedding = self.main.get_submodule("model.embed_tokens")
        seen = self.joint(self.tower(input_ids=input_ids).last_hidden_state)
        return self.main(inputs_embeds=embedding(input_ids) + seen, labels=labels)


def with_small_tower(sequence_parallel: bool) -> tuple[list[str], float, list[str]]:
    """What is warned of, the worst difference of a loss, and the sharded weights in a layer of the
    tower."""
    expected = single_losses(SmallTower(), clip=0.0)
    model = SmallTower()
    with logged_warnings() as texts:
        deepspeed_autotp.parallelize(
            model,
            tp_size=dist.get_world_size(),
            config={"sequence_parallel": sequence_parallel},
            example_inputs={"input_ids": tokens(9), "labels": tokens(9)},
        )
    losses = single_losses(model, clip=0.0)
    deepspeed_autotp.check_replicas(model)
    entries = deepspeed_autotp.tensor_parallel(model).plan.entries
    found = [e.name for e in entries if e.name.startswith("tower.layers.0.") and e.dim >= 0]
    return texts, worst_difference(losses, expected), found
