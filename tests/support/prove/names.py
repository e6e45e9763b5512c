# SPDX-License-Identifier: Apache-2.0
"""What layers, counts and families are called."""

# How the layers of an attention are called: queries, keys, values, output; fused; keys|values.
NAMES = {
    "q_proj": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "kv_proj"),
    "wq": ("wq", "wk", "wv", "wo", "wqkv", "wkv"),
    "to_q": ("to_q", "to_k", "to_v", "to_out", "to_qkv", "to_kv"),
    "query": ("query", "key", "value", "dense", "query_key_value", "key_value"),
    "q": ("q", "k", "v", "o", "qkv", "kv"),
    "c_attn": ("q_attn", "k_attn", "v_attn", "c_proj", "c_attn", "kv_attn"),
    "in_proj": ("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "kv_proj"),
    "qkv": ("q_lin", "k_lin", "v_lin", "proj", "qkv", "kv"),
    "unknown": ("asker", "index", "content", "mix", "triple", "pair"),
}
# How those of a network are called: gate, up, down; gate|up.
NETWORK_NAMES = {
    "up_proj": ("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
    "w1": ("w1", "w3", "w2", "w13"),
    "fc1": ("gate", "fc1", "fc2", "fc1"),
    "c_fc": ("w_gate", "c_fc", "c_proj", "c_fc"),
    "wi": ("wi_0", "wi_1", "wo", "wi"),
    "linear1": ("linear3", "linear1", "linear2", "linear1"),
    "unknown": ("valve", "widen", "narrow", "widen"),
}
# How the counts of heads, of key/value heads and of features of a head are called.
COUNT_NAMES = {
    "num_heads": ("num_heads", "num_key_value_heads", "head_dim"),
    "n_head": ("n_head", "n_kv_head", "head_size"),
    "n_heads": ("n_heads", "n_kv_heads", "head_dim"),
    "heads": ("heads", "kv_heads", "dim_head"),
    "unknown": ("n_q", "n_groups", "size"),
}

# Causal language models of transformers.
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "phi", "gpt2",
    "gpt_neo", "gpt_neox", "gptj", "bloom", "falcon", "opt", "mixtral", "qwen2_moe", "qwen3_moe",
    "olmo", "olmo2", "olmoe", "cohere", "cohere2", "glm", "glm4", "granite", "starcoder2",
    "stablelm", "deepseek_v2", "deepseek_v3", "gpt_oss", "persimmon", "gpt_bigcode", "helium",
    "smollm3", "nemotron", "mpt",
)  # fmt: skip
# Encoders, encoder-decoders, and models that see or hear.
ENCODERS = (
    "bert", "bert classes", "roberta", "roberta classes", "distilbert", "electra", "albert",
    "deberta-v2", "modernbert", "t5", "gated t5", "bart", "mbart", "pegasus", "marian", "whisper",
    "vit", "clip", "siglip",
)  # fmt: skip
