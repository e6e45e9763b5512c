# SPDX-License-Identifier: Apache-2.0
"""The figures that a configuration is shrunk with, and what single model types need beside them.

Data only: benchmarks/shrink.py says how they are applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

VOCABULARY = 96
# Tokens are drawn from here: numbers below are for padding and the like, those above for images,
# sounds and other places where a text has none.
FIRST_TOKEN, LAST_TOKEN = 8, 80
LAYERS = 2

HIDDEN, HEADS, KEY_HEADS, HEAD_DIM, FEATURES = 64, 4, 2, 16, 128
EXPERTS, EXPERTS_PER_TOKEN = 4, 2

_Value = TypeVar("_Value")

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")


def _same(value: _Value, names: str) -> dict[str, _Value]:
    return dict.fromkeys(names.split(), value)


SIZES: Mapping[str, object] = {
    **_same(
        VOCABULARY,
        "vocab_size decoder_vocab_size vocab_size_per_layer_input pronunciation_vocab_size "
        "shape_vocab_size audio_vocab_size encoder_hash_byte_group_vocab",
    ),
    **_same(
        HIDDEN,
        "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim embedding_dim "
        "input_embedding_size output_embedding_size lru_width attention_hidden_size "
        "hidden_size_global backbone_hidden_size pronunciation_embed_dim shape_embed_dim "
        "input_size adapter_out_dim out_hidden_size projector_output_dim",
    ),
    **_same(
        FEATURES,
        "intermediate_size ffn_dim d_ff d_inner n_inner dff dim_ff ffn_hidden_size "
        "feed_forward_size encoder_ffn_dim decoder_ffn_dim moe_intermediate_size "
        "intermediate_size_mlp dense_intermediate_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size mamba_d_ssm",
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
        "global_head_dim swa_head_dim v_head_dim swa_v_head_dim qk_nope_head_dim index_head_dim "
        "linear_head_dim linear_key_head_dim linear_value_head_dim q_lora_rank kv_lora_rank "
        "o_lora_rank hidden_size_per_layer_input laurel_rank query_pre_attn_scalar",
    ),
    **_same(16, "hc_lowrank router_hidden_size rel_extent"),
    "zero_expert_num": 2,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "rotary_dim": 8,
    **_same(EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_same(
        EXPERTS_PER_TOKEN,
        "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts",
    ),
    # Dense layers come first where a model has both kinds.
    **_same(
        1,
        "n_group topk_group num_expert_group n_shared_experts num_shared_experts "
        "moe_num_shared_experts num_nextn_predict_layers first_k_dense_replace num_dense_layers",
    ),
    # State space models: heads * width of a head = expand * hidden.
    **_same(8, "mamba_n_heads mamba_num_heads mamba_d_state state_size ssm_state_size"),
    **_same(16, "mamba_d_head mamba_head_dim mamba_chunk_size chunk_size block_size"),
    **_same(4, "mamba_dt_rank time_step_rank"),
    **_same(2, "mamba_n_groups mamba_ngroups n_groups"),
    **_same(
        64,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length "
        "max_source_positions max_target_positions",
    ),
    # Less than the tokens of a row, so that the window and the choice of keys take effect.
    **_same(
        8,
        "sliding_window attention_window_size local_attention sliding_window_size index_topk "
        "attention_chunk_size local_attention_window_len",
    ),
    # Ten times the usual weights give every head something to say, and so make errors visible.
    **_same(0.1, "initializer_range init_std"),
    "is_decoder": True,
    "use_cache": False,
}

# Where None means that something is absent and absent it stays.
OPTIONAL = frozenset({"sliding_window", "attention_chunk_size", "global_head_dim", "mamba_d_ssm"})

# What else holds for a configuration that has the attribute.
IMPLIED: Mapping[str, Mapping[str, object]] = {
    # Keys and values come out of one compressed vector, for every head.
    "kv_lora_rank": {"num_key_value_heads": HEADS},
}

# Parts for images and sound: no token of the sweep uses them, so they are kept small beside the
# text model, as they are in the full models.
SENSES: Mapping[str, object] = {
    **SIZES,
    **_same(
        32,
        "hidden_size intermediate_size output_channels mlp_dim vision_output_dim "
        "nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel",
    ),
    **_same(1, "num_hidden_layers num_blocks depth num_global_layers"),
}
SENSE_PARTS = frozenset({"vision_config", "audio_config", "audio_encoder", "vq_config"})

# Layers with a sliding window have heads and ranks of their own.
_WINDOWED: Mapping[str, object] = {
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": HEAD_DIM,
    "swa_kv_lora_rank": HEAD_DIM,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": HEAD_DIM,
}

_INDEXER: Mapping[str, object] = {
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

EXCEPTIONS: Mapping[str, Mapping[str, object]] = {
    **_same({"head_dim": 8}, "axk1 deepseek_v3 longcat_flash youtu"),
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
    },
    "git": {"vision_config.image_size": 32, "vision_config.patch_size": 16},
    "dots3_note": {
        **{f"text_config.{key}": value for key, value in _WINDOWED.items()},
        "vision_config.adapter_in_dim": 32,
        "audio_config.adapter_input_size": 32,
        "audio_config.downsample_hidden_size": 16,
        "audio_config.conv_output_size": 256,
    },
    "dots3_note_text": _WINDOWED,
    **_same({"global_head_dim": 2 * HEAD_DIM}, "gemma4_text gemma4_unified_text"),
    **_same({"text_config.global_head_dim": 2 * HEAD_DIM}, "gemma4 gemma4_unified"),
    "fuyu": {"patch_size": 4},
    "got_ocr2": {"vision_config.image_size": 64},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [FEATURES] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    # Layer 0 is a dense recurrent one, layer 1 attention with experts.
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {
        "text_config.interleave_moe_layer_step": 2,
        "text_config.moe_layers": [1],
    },
    "llama4_text": {"interleave_moe_layer_step": 2, "moe_layers": [1]},
    "mamba2": {"num_heads": 8},
    "mllama": {"text_config.cross_attention_layers": [1]},
    "qwen4_exp": {f"text_config.{key}": value for key, value in _INDEXER.items()},
    "qwen4_exp_text": _INDEXER,
    "reformer": {
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [3, 4],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
    },
    "zamba2": {
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
    },
    "zaya": {"num_experts_per_tok": 1},
}


# What a model takes beside tokens: names and shapes without the first dimension, the rows.
INPUTS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    **_same(
        {"encoder_hidden_states": (6, HIDDEN)},
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen mvp pegasus "
        "plbart prophetnet trocr",
    ),
    "git": {"pixel_values": (3, 32, 32)},
    "mllama": {"cross_attention_states": (6, HIDDEN)},
    "whisper": {"encoder_outputs": (6, HIDDEN)},
}

# Where the model of tokens is a part of what the configuration describes.
PARTS: Mapping[str, str] = {"musicgen": "decoder", "musicgen_melody": "decoder"}

# Streams of tokens side by side: a row of labels has one column for each.
STREAMS: Mapping[str, int] = {"musicgen": 4, "musicgen_melody": 4}

# What no training loop of tokens and labels can run, and why.
UNTRAINABLE: Mapping[str, str] = dict.fromkeys(
    ("gemma4_assistant", "gemma4_unified_assistant"),
    "takes no labels: it continues the hidden states of a larger model when text is generated",
)
