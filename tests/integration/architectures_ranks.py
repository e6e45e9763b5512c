# SPDX-License-Identifier: Apache-2.0
"""Small models with more than attention and one MLP, trained on every rank by
tests.integration.test_architectures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from tests.support.architectures import build
from tests.support.log_records import logged_warnings
from tests.support.loss_curves import single_losses, worst_difference

# No plan comes with this one: experts [experts, in, out] whose gate and up alternate, biases,
# and one number per head.
_PARTITION: dict[str, Any] = {
    "olmo2": {
        "layer_specs": [
            {"patterns": [r".*\.(q|k|v|gate|up)_proj\.weight$"], "partition_type": "column"},
            {"patterns": [r".*\.(o|down)_proj\.weight$"], "partition_type": "row"},
        ]
    },
    "gpt_oss": {
        "layer_specs": [
            {"patterns": [r".*\.[qkv]_proj\.weight$", r".*\.sinks$"], "partition_type": "column"},
            {"patterns": [r".*\.o_proj\.weight$"], "partition_type": "row"},
            {
                "patterns": [r".*\.experts\.gate_up_proj$"],
                "partition_type": "column",
                "partition_dim": 2,
            },
            {
                "patterns": [r".*\.experts\.down_proj$"],
                "partition_type": "row",
                "partition_dim": 1,
            },
        ]
    },
}
# Models of the sweep whose own plan lacks something, or that have none: the ranks, what the only
# warning begins with, and the most that a rank may hold.
_APART = "model.layers.*.{} is sharded layer by layer"
_UNPAIRED = "the block of '{}.out_proj' is not sharded as one: "
INCOMPLETE = {
    "apertus": (2, "", 0.51),  # numbers of the activation
    "doge": (2, _APART.format("self_attn"), 0.51),  # a mask made of all heads
    # A threshold over all features, and keys from another layer.
    "gemma3n_text": (4, _APART.format("mlp"), 0.28),
    # Gate and up as one piece; attention is not in the plan, and has more than heads in it.
    "inkling_text": (2, _APART.format("self_attn"), 0.57),
    # Experts whose gate and up alternate, with biases, and a per-head vector.
    "gpt_oss, no rules": (4, "", 0.27),
    "dbrx": (2, "", 0.52),  # experts stacked in two dimensions, and viewed by their parent
    "jetmoe": (4, "", 0.36),  # a module for each layer of all experts
    "zaya": (2, "", 0.54),  # experts, and attention of layers that no pair fits
    "mamba": (2, _UNPAIRED.format("backbone.layers.*.mixer"), 0.55),
    "codegen": (4, _UNPAIRED.format("transformer.h.*.attn"), 0.26),
    "youtu": (2, "", 0.53),  # latent attention that the plan leaves out
}


@dataclass(frozen=True, slots=True)
class Trained:
    """Losses against one process, the largest distance of a weight, what this rank holds of the
    parameters, the kinds of the layers, and the warnings about blocks."""

    apart: float
    weights: float
    share: float
    kinds: frozenset[str]
    left: list[str]


def train(name: str) -> Trained:
    """Train ``name`` sharded over all ranks and in one process."""
    alone = build(name)
    expected = single_losses(alone, clip=0.0)
    model = build(name)
    partition = _PARTITION.get(name)
    config: Mapping[str, Any] = {"partition_config": partition} if partition else {}
    with logged_warnings() as texts:
        deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=config)
    layers = deepspeed_autotp.tensor_parallel(model).plan.layers
    losses = single_losses(model, clip=0.0)
    deepspeed_autotp.check_replicas(model)
    full = deepspeed_autotp.full_state_dict(model)
    return Trained(
        apart=worst_difference(losses, expected),
        weights=max(float((full[n] - p.detach()).abs().max()) for n, p in alone.named_parameters()),
        share=_size(model) / _size(alone),
        kinds=frozenset(layer.kind for layer in layers),
        left=[text for text in texts if not text.startswith("rule ")],
    )


def train_experts(name: str) -> tuple[Trained, float]:
    """As ``train`` with the sizes of the sweep, and how far the loss of both models differs once
    they are cast to bfloat16, as an engine does that is given one in float32."""
    trained = train(f"{name}, no rules")
    losses = []
    for sharded in (False, True):
        model = build(f"{name}, no rules")
        if sharded:
            with logged_warnings():
                deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
        losses += single_losses(model.bfloat16(), clip=0.0, steps=1)
    return trained, abs(losses[1] / losses[0] - 1)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
