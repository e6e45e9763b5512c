# SPDX-License-Identifier: Apache-2.0
"""Small models with more than attention and one MLP, trained on every rank by
tests.integration.test_architectures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from benchmarks import shrink
from tests.support.log_records import logged_warnings
from tests.support.loss_curves import single_losses, worst_difference

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "head_dim": 8,
}
_EXPERTS: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
_MORE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**_LATENT, **_EXPERTS, "topk_group": 1, "first_k_dense_replace": 1},
    "deepseek_v3": {**_LATENT, **_EXPERTS, "topk_group": 1, "first_k_dense_replace": 1},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 96,
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 16,
    },
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "longcat_flash": {
        **_LATENT,
        "num_layers": 1,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 48,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    # Norms over all heads of queries and of keys, sharded all the same.
    "olmo2": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}
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
ARCHITECTURES = tuple(_MORE)
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


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    of_sweep = name in INCOMPLETE or "," in name
    model = shrink.build(name.partition(",")[0]) if of_sweep else _model(name)
    with torch.no_grad():  # what starts at zero would hide its own gradient
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.1)
    return model.train()


def _model(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **{**_SIZES, **_MORE[name]})
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


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
