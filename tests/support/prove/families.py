# SPDX-License-Identifier: Apache-2.0
"""Small models of transformers' families, in the sizes of a case."""

from typing import Any

import torch
from torch import nn

from tests.support.prove.case import Case
from tests.support.prove.names import FAMILIES

_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 20, "shared_expert_intermediate_size": 18, "decoder_sparse_step": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "mlp_only_layers": [],
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 5, "head_dim": 4,
}  # fmt: skip
_LATENT_FAMILIES = ("deepseek_v2", "deepseek_v3")
# What a family needs besides, or has another name for.
_MORE: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "mistral": {"sliding_window": None},
    "cohere2": {"sliding_window": 4},
    "phi": {"partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": None},
    "gpt_oss": {"sliding_window": 4},
    "gpt_neo": {"window_size": 4},
    "falcon": {"new_decoder_architecture": True},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
}
# Positions in a part of each head, which has to be even.
_PARTIAL_ROTARY = ("phi", "persimmon", "stablelm", "gpt_neox", "glm", "glm4", "nemotron")
# Families whose heads have a size of their own; elsewhere it is hidden size / heads.
_HEAD_SIZE = ("mistral", "qwen3", "mixtral", "glm", "glm4", "gpt_oss")


def options(case: Case) -> dict[str, Any]:
    """The configuration of a family in the sizes of a case."""
    heads, size, layers = case.heads, case.head_size, case.layers
    if case.family in _PARTIAL_ROTARY:
        size = 8
    hidden = case.hidden if case.family in _HEAD_SIZE else heads * size
    names = {
        "vocab_size": case.vocabulary,
        "hidden_size": hidden, "n_embd": hidden, "d_model": hidden, "word_embed_proj_dim": hidden,
        "intermediate_size": case.inner, "n_inner": case.inner, "ffn_dim": case.inner,
        "num_hidden_layers": layers, "n_layer": layers, "n_layers": layers, "num_layers": layers,
        "num_attention_heads": heads, "n_head": heads, "n_heads": heads, "num_heads": heads,
        "num_key_value_heads": case.groups or heads, "num_kv_heads": case.groups or heads,
        "head_dim": size, "rotary_dim": size,
        "attention_types": [[["global"], layers - layers // 2], [["local"], layers // 2]],
        "max_position_embeddings": 32, "n_positions": 32, "max_seq_len": 32,
        "tie_word_embeddings": case.tied == "weight",
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if case.family in _LATENT_FAMILIES:
        names["num_key_value_heads"] = heads
    return {**names, **_EXPERTS, **_dropouts(), **_MORE.get(case.family, {})}


def _dropouts() -> dict[str, float]:
    names = (
        "dropout attention_dropout activation_dropout resid_pdrop embd_pdrop attn_pdrop "
        "hidden_dropout resid_dropout embed_dropout layerdrop residual_dropout embedding_dropout"
    )
    return dict.fromkeys(names.split(), 0.0)


def make_family(case: Case) -> nn.Module:
    """A causal language model; what the configuration does not know is left out."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert case.family in FAMILIES
    plain = CONFIG_MAPPING[case.family]()
    aliases = {*plain.to_dict(), *plain.attribute_map}
    known = {k: v for k, v in options(case).items() if k in aliases}
    config = AutoConfig.for_model(case.family, **known)
    with torch.random.fork_rng([]):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation("eager")  # type: ignore[operator]  # float64 has no other
    checkpoint_family(case, model)
    return model


def checkpoint_family(case: Case, model: nn.Module) -> None:
    if case.checkpointing and model.supports_gradient_checkpointing:
        reentrant = case.checkpointing == "reentrant"
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
