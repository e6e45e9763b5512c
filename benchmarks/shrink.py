# SPDX-License-Identifier: Apache-2.0
"""Every causal language model of transformers, small enough to train in a moment.

A configuration is shrunk by the names of its attributes: widths, heads, experts and ranks take
the value of ``SIZES``, lists with one element per layer keep the fewest layers that show every
value, token numbers fall inside the vocabulary, random noise is turned off. What these rules do
not get right stands in ``EXCEPTIONS``, one row per model type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

VOCABULARY = 96
# Tokens are drawn from here: numbers below are for padding and the like, those above for images,
# sounds and other places where a text has none.
FIRST_TOKEN, LAST_TOKEN = 8, 80
LAYERS = 2

HIDDEN, HEADS, KEY_HEADS, HEAD_DIM, FEATURES = 64, 4, 2, 16, 128
EXPERTS, EXPERTS_PER_TOKEN = 4, 2

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")


def _same(value: object, names: str) -> dict[str, object]:
    return dict.fromkeys(names.split(), value)


SIZES: Mapping[str, object] = {
    **_same(VOCABULARY, "vocab_size decoder_vocab_size vocab_size_per_layer_input"),
    **_same(
        HIDDEN,
        "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim embedding_dim "
        "input_embedding_size output_embedding_size lru_width attention_hidden_size "
        "hidden_size_global backbone_hidden_size",
    ),
    **_same(
        FEATURES,
        "intermediate_size ffn_dim d_ff d_inner n_inner dff dim_ff ffn_hidden_size "
        "feed_forward_size encoder_ffn_dim decoder_ffn_dim moe_intermediate_size "
        "intermediate_size_mlp dense_intermediate_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size",
    ),
    **_same(
        HEADS,
        "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "num_attention_heads_per_layer index_n_heads linear_num_heads linear_num_value_heads "
        "swa_num_attention_heads",
    ),
    **_same(
        KEY_HEADS,
        "num_key_value_heads num_kv_heads kv_n_heads linear_num_key_heads swa_num_key_value_heads "
        "num_query_groups",
    ),
    **_same(
        HEAD_DIM,
        "head_dim d_head d_kv dim_head kv_channels attention_head_dim attention_head_size "
        "global_head_dim swa_head_dim v_head_dim qk_nope_head_dim index_head_dim linear_head_dim "
        "linear_key_head_dim linear_value_head_dim q_lora_rank o_lora_rank swa_v_head_dim",
    ),
    **_same(16, "kv_lora_rank hidden_size_per_layer_input laurel_rank query_pre_attn_scalar"),
    **_same(8, "qk_rope_head_dim rotary_dim"),
    "qk_head_dim": 24,
    **_same(
        EXPERTS,
        "num_experts num_local_experts n_routed_experts moe_num_experts",
    ),
    **_same(
        EXPERTS_PER_TOKEN,
        "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts",
    ),
    **_same(
        1,
        "n_group topk_group num_expert_group n_shared_experts num_shared_experts "
        "moe_num_shared_experts num_nextn_predict_layers first_k_dense_replace num_dense_layers",
    ),
    # State space models: heads * width of a head = expand * hidden.
    **_same(8, "mamba_n_heads mamba_num_heads mamba_d_state state_size ssm_state_size"),
    **_same(16, "mamba_d_head mamba_head_dim"),
    **_same(4, "mamba_dt_rank time_step_rank"),
    **_same(16, "mamba_chunk_size chunk_size block_size"),
    **_same(2, "mamba_n_groups mamba_ngroups n_groups"),
    **_same(
        64,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length "
        "max_source_positions max_target_positions",
    ),
    **_same(
        8,
        "sliding_window attention_window_size local_attention sliding_window_size "
        "attention_chunk_size local_attention_window_len",
    ),
    "use_cache": False,
    "is_decoder": True,
}

EXCEPTIONS: Mapping[str, Mapping[str, object]] = {}


def config(model_type: str) -> PretrainedConfig:
    """The shrunken configuration of a model type."""
    changes = EXCEPTIONS.get(model_type, {})
    full = AutoConfig.for_model(model_type)
    return AutoConfig.for_model(model_type, **_shrunk(full, changes))


def build(model_type: str, *, seed: int = 0) -> nn.Module:
    """A model in float32 and training mode, with the weights that ``seed`` gives."""
    shrunk = config(model_type)
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(shrunk, dtype=torch.float32)
    return model.train()


def batch(model_type: str, step: int, *, rows: int = 4, length: int = 12) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward: ``[rows, length]`` tokens, which are labels too."""
    draw = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(FIRST_TOKEN, LAST_TOKEN, (rows, length), generator=draw)
    return {"input_ids": ids, "labels": ids}


def _shrunk(full: PretrainedConfig, changes: Mapping[str, object]) -> dict[str, Any]:
    """Keyword arguments of the configuration's class. ``changes`` win; a dotted key belongs to a
    part of the configuration."""
    values = vars(full)
    own = {key: value for key, value in changes.items() if "." not in key}
    kept, count = _layers(values)
    shrunk: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith("_"):
            continue
        if isinstance(value, PretrainedConfig):
            prefix = f"{key}."
            inner = {k.removeprefix(prefix): v for k, v in changes.items() if k.startswith(prefix)}
            shrunk[key] = _shrunk(value, inner)
        elif key in own:
            continue
        elif key in _LAYER_COUNTS:
            shrunk[key] = len(kept)
        elif isinstance(value, list | tuple) and len(value) == count:
            if key in SIZES:
                shrunk[key] = [SIZES[key]] * len(kept)
            elif len(set(map(str, value))) < count:
                shrunk[key] = type(value)(value[index] for index in kept)
        else:
            _shrink_value(shrunk, key, value)
    return shrunk | own


def _layers(values: Mapping[str, Any]) -> tuple[Sequence[int], int]:
    """The layers to keep and the number there were: every value of every list shows."""
    counts = [value for key, value in values.items() if key in _LAYER_COUNTS]
    if not counts:
        return range(LAYERS), -1
    count = counts[0]
    lists = [
        value
        for key, value in values.items()
        if isinstance(value, list | tuple)
        and len(value) == count
        and key not in SIZES
        and len(set(map(str, value))) < count
    ]
    kept: list[int] = []
    for index in range(count):
        new = any(
            str(each[index]) not in {str(each[before]) for before in kept} for each in lists
        )
        if new:
            kept.append(index)
    for index in range(count):
        if len(kept) >= min(LAYERS, count):
            break
        if index not in kept:
            kept.append(index)
    return sorted(kept), count


def _shrink_value(shrunk: dict[str, Any], key: str, value: object) -> None:
    if key in SIZES:
        if value is not None:
            shrunk[key] = SIZES[key]
    elif isinstance(value, float) and _is_noise(key):
        shrunk[key] = 0.0
    elif isinstance(value, int) and key.endswith(("layers", "layer")) and value > LAYERS:
        shrunk[key] = LAYERS
    elif isinstance(value, int) and key.endswith(("_id", "_index")) and value >= VOCABULARY:
        shrunk[key] = LAST_TOKEN + value % (VOCABULARY - LAST_TOKEN)


def _is_noise(key: str) -> bool:
    """Whether an attribute is the probability or size of something random."""
    return any(word in key for word in ("drop", "jitter", "mask_time_prob", "mask_feature_prob"))
