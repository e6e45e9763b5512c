# SPDX-License-Identifier: Apache-2.0
"""Small models of the families that the tests train, and the tokens they train on."""

from typing import Any

import torch
from torch import nn

VOCABULARY = 96

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
_MORE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "phi3": {"pad_token_id": 0},
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")


def build(family: str, *, tied: bool, seed: int = 0, **changes: Any) -> nn.Module:
    """A causal language model in float32 with the weights that ``seed`` gives."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = {**_SIZES, **_MORE.get(family, {}), "tie_word_embeddings": tied, **changes}
    config = AutoConfig.for_model(family, **sizes)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.train()


def tokens(step: int, *, rows: int = 4, length: int = 12, vocabulary: int = VOCABULARY) -> Any:
    """``[rows, length]`` token ids, the same on every rank."""
    draw = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, vocabulary, (rows, length), generator=draw)


def model_with_buffers(seed: int) -> nn.Module:
    """With buffers of types that few backends carry."""
    model = build("llama", tied=False, seed=seed)
    model.register_buffer("mask", torch.tensor([seed == 0, True]))
    model.register_buffer("phase", torch.tensor([1j * seed]))
    model.register_buffer("count", torch.tensor(seed))
    return model
