# SPDX-License-Identifier: Apache-2.0
"""Small models with more than attention and one MLP: experts, latent attention, wide norms."""

from typing import Any

import torch
from torch import nn

from benchmarks import shrink

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
ARCHITECTURES = tuple(_MORE)


def build(name: str) -> nn.Module:
    """The model of this type, or, of other types and as "type, ...", that of the sweep."""
    torch.manual_seed(0)
    model = _model(name) if name in _MORE else shrink.build(name.partition(",")[0])
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
