# SPDX-License-Identifier: Apache-2.0
"""Small models of transformers whose weights are laid out, tied or converted in different ways."""

from typing import Any

import torch
from torch import nn

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
# By a name of the test's own: the type of the model, and what differs from the sizes above.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "head_dim": 8, **_EXPERTS}),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "tie_word_embeddings": True}),
    "bloom": ("bloom", {"n_head": 8, "n_layer": 2, "tie_word_embeddings": True}),
    "falcon": ("falcon", {"tie_word_embeddings": True}),
    "t5": (
        "t5",
        {"d_model": 64, "num_layers": 2, "num_heads": 8, "d_kv": 8, "d_ff": 112}
        | {"tie_word_embeddings": True},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "llama4": ("llama4_text", {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 96}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "head_dim": 8}),
    "deepseek_v3": (
        "deepseek_v3",
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        | {**_EXPERTS, **_LATENT},
    ),
}


def build_pretrained(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A model of :data:`MODELS` with the same random weights on every rank."""
    from transformers import AutoConfig

    model_type, more = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_SIZES, **more, **changes})
    model: nn.Module = auto_class(config).from_config(config, dtype=dtype)
    return model


def load_pretrained(folder: str) -> tuple[nn.Module, dict[str, Any]]:
    """What plain transformers load from ``folder``, and what it says was missing or too much."""
    from transformers import AutoConfig

    found = auto_class(AutoConfig.from_pretrained(folder))
    model, info = found.from_pretrained(folder, output_loading_info=True)
    return model, {key: value for key, value in info.items() if value}


def auto_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
