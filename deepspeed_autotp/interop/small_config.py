# SPDX-License-Identifier: Apache-2.0
"""The configuration of a transformers model made small, and models of it.

All widths are divided by one factor, so that whatever holds between them goes on to hold: heads
times their size, parts of fused weights, an inner width that is a multiple of another. Counts of
heads, experts and groups stay, and so do the first layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from deepspeed_autotp.interop.model_changes import checkpoint_blocks


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LAYERS = _names(
    "num_hidden_layers n_layer n_layers num_layers num_blocks depth encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers"
)
_VOCABULARIES = _names("vocab_size decoder_vocab_size vocab_size_per_layer_input")
# Of a head: an odd size would do for none that is rotated.
_HEAD_SIZES = _names(
    "head_dim d_head d_kv dim_head kv_channels attention_head_dim attention_head_size "
    "global_head_dim swa_head_dim v_head_dim swa_v_head_dim qk_nope_head_dim index_head_dim "
    "linear_head_dim linear_key_head_dim linear_value_head_dim qk_rope_head_dim qk_head_dim "
    "rotary_dim mamba_d_head mamba_head_dim query_pre_attn_scalar"
)
# Sharded in the plan, or the widths of what is.
_WIDTHS = _names(
    "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim embedding_dim "
    "input_embedding_size output_embedding_size lru_width attention_hidden_size "
    "intermediate_size ffn_dim d_ff d_inner n_inner dff dim_ff ffn_hidden_size feed_forward_size "
    "encoder_ffn_dim decoder_ffn_dim moe_intermediate_size intermediate_size_mlp "
    "dense_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size "
    "mamba_d_ssm out_hidden_size projector_output_dim"
)
_HIDDEN = _names("hidden_size d_model n_embd emb_dim")
_RANKS = _names(
    "q_lora_rank kv_lora_rank o_lora_rank hidden_size_per_layer_input laurel_rank "
    "router_hidden_size"
)
_HEAD_COUNTS = _names(
    "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads"
)
_POSITIONS = _names("max_position_embeddings n_positions n_ctx max_seq_len")
_SPREADS = _names("initializer_range init_std")

# The attribute of modules whose activations are recomputed.
_CHECKPOINTING = "_gradient_checkpointing_func"
_MOST_POSITIONS = 2048
_LEAST_HEAD = 8
_LEAST_ROTATED = 2
_LEAST_VOCABULARY = 256
# Weights that give every head something to say, and so make errors visible.
_SPREAD = 0.05


def small_model(model: nn.Module, config: Any, *, device: str) -> nn.Module:
    """A model of the class of ``model``, in float32, with the rules of its plan, its loss and its
    activation checkpointing.

    Raises whatever the class raises for a configuration that it does not take.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device(device):
            small: nn.Module = type(model)(config)
    finally:
        torch.set_default_dtype(before)
    for key in ("_tp_plan", "_loss_function"):
        if key in vars(model):
            vars(small)[key] = copy.copy(vars(model)[key])
    checkpointing = [f for m in model.modules() if (f := vars(m).get(_CHECKPOINTING)) is not None]
    if checkpointing:
        options = checkpointing[0].keywords
        checkpoint_blocks(small, options)
    return small.float().train()


def is_configured(model: nn.Module) -> bool:
    """Whether ``model`` is one of transformers, which is made of a configuration alone."""
    return hasattr(type(model), "_from_config") and hasattr(model, "config")


def with_layers(model: nn.Module, layers: int) -> Any:
    """A copy of the configuration with at most so many layers of each kind of stack."""
    config = copy.deepcopy(model.config)
    for part in _parts(config):
        values = vars(part)
        for count in _layer_counts(values):
            for key, value in list(values.items()):
                if isinstance(value, (list, tuple)) and len(value) == count > layers:
                    values[key] = value[:layers]
        for key, value in list(values.items()):
            if key in _LAYERS and type(value) is int:
                values[key] = min(value, layers)
            # A kernel that takes 16-bit floats only.
            if key.startswith("_attn_implementation") and str(value).startswith("flash"):
                values[key] = "sdpa"
    return config


def layers_to_try(model: nn.Module, most: int) -> Iterator[int]:
    """Numbers of first layers, from the fewest that show all values of the lists with a value for
    each layer."""
    fewest = 2
    for part in _parts(model.config):
        values = vars(part)
        counts = _layer_counts(values)
        for value in values.values():
            if isinstance(value, (list, tuple)) and len(value) in counts:
                first = {str(each): at for at, each in reversed(list(enumerate(value)))}
                if len(first) < len(value):
                    fewest = max(fewest, *(at + 1 for at in first.values()))
    yield from (n for n in (*range(fewest, fewest + 4), 8, 12, 16) if fewest <= n <= most)


def factors(config: Any, *, ranks: int) -> list[int]:
    """What all widths may be divided by, largest first: heads stay even and of some size, and what
    the ranks can share equally they still can."""
    widths, heads, others = _widths(config)
    common = math.gcd(*widths, *heads, *others)
    return [
        factor
        for factor in range(common, 1, -1)
        if common % factor == 0
        and all(w % ranks != 0 or w // factor % ranks == 0 for w in widths)
        and all(h // factor % 2 == h % 2 for h in heads)
        and max(heads, default=factor * _LEAST_HEAD) // factor >= _LEAST_HEAD
        and min(heads, default=factor * _LEAST_ROTATED) // factor >= _LEAST_ROTATED
    ]


def narrowed(config: Any, factor: int, *, ranks: int) -> Any:
    """A copy with widths divided by ``factor``, a small vocabulary and few positions."""
    config = copy.deepcopy(config)
    largest = max(_widths(config)[0], default=0) // factor
    for part in _parts(config):
        values = vars(part)
        full = _vocabulary_size(values)
        for key, value in list(values.items()):
            values[key] = _narrowed(key, value, factor)
            if key in _VOCABULARIES and _is_count(value):
                values[key] = _vocabulary(value, 2 * largest, ranks)
            elif key in _POSITIONS and _is_count(value):
                values[key] = min(value, _MOST_POSITIONS)
            elif key in _SPREADS:
                values[key] = _SPREAD
        small = _vocabulary_size(values)
        if 0 < small < full:
            _move_tokens(values, small)
    return config


def _layer_counts(values: Mapping[str, Any]) -> set[int]:
    return {v for k, v in values.items() if k in _LAYERS and type(v) is int}


def _vocabulary_size(values: Mapping[str, Any]) -> int:
    """The largest one; 0 without any."""
    return max((v for k, v in values.items() if k in _VOCABULARIES and _is_count(v)), default=0)


def _narrowed(key: str, value: Any, factor: int) -> Any:
    if key in _WIDTHS | _HEAD_SIZES | _RANKS:
        if _is_count(value):
            return value // factor
        if isinstance(value, (list, tuple)) and all(map(_is_count, value)):
            return type(value)(each // factor for each in value)
    if isinstance(value, Mapping) and key.startswith("rope"):
        # Factors for each of the rotated features.
        return {k: _shortened(v, factor) for k, v in value.items()}
    return value


def _shortened(value: Any, factor: int) -> Any:
    if isinstance(value, list):
        return value[: max(1, len(value) // factor)]
    return (
        {k: _shortened(v, factor) for k, v in value.items()} if isinstance(value, dict) else value
    )


def _vocabulary(size: int, least: int, ranks: int) -> int:
    """A smaller one that leaves the ranks as much over."""
    least, step = max(least, _LEAST_VOCABULARY), 16 * ranks
    return min(size, least + (size - least) % step)


def _move_tokens(values: dict[str, Any], vocabulary: int) -> None:
    """Let token numbers beyond the vocabulary be its last ones, in the same order."""
    names = [k for k in values if k.endswith(("_id", "_ids", "_index"))]
    flat = [
        number
        for name in names
        for number in (values[name] if isinstance(values[name], list) else [values[name]])
        if type(number) is int and number >= vocabulary
    ]
    moved = {number: vocabulary - 1 - at for at, number in enumerate(sorted(set(flat))[::-1])}
    for name in names:
        value = values[name]
        if isinstance(value, list):
            values[name] = [moved.get(each, each) for each in value]
        elif type(value) is int:
            values[name] = moved.get(value, value)


def _widths(config: Any) -> tuple[set[int], set[int], set[int]]:
    """Widths that are sharded or the like, sizes of heads, and ranks of factors."""
    widths: set[int] = set()
    heads: set[int] = set()
    others: set[int] = set()
    for part in _parts(config):
        values = vars(part)
        for key, value in values.items():
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if all(map(_is_count, numbers)):
                widths.update(numbers if key in _WIDTHS else ())
                heads.update(numbers if key in _HEAD_SIZES else ())
                others.update(numbers if key in _RANKS else ())
        if not any(_is_count(values.get(key)) for key in _HEAD_SIZES):
            hidden = [v for k, v in values.items() if k in _HIDDEN and _is_count(v)]
            counts = [values[k] for k in _HEAD_COUNTS if _is_count(values.get(k))]
            heads.update(h // n for h in hidden for n in counts if h % n == 0)
    return widths, heads, others


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _parts(config: Any) -> Iterator[Any]:
    """The configuration and those within it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from _parts(value)
