# SPDX-License-Identifier: Apache-2.0
"""Small encoders with a head, encoder-decoders and image-text models, and a batch for each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, IMAGE_TOKEN = 99, 98
ROWS, LENGTH = 4, 10
PATCHES = 4  # of an image of llava

_T5: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_BART: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
    "max_position_embeddings": 32,
    "init_std": 0.1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_BERT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    "initializer_range": 0.1,
}
_TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
_SIGHT: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
    "initializer_range": 0.1,
    "initializer_factor": 1.0,
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of transformers, the model type and changes of its configuration, and what makes a
    batch for it."""

    model: str
    config: str
    sizes: Mapping[str, Any]
    batch: Callable[[torch.Generator], dict[str, Tensor]]


def _ids(draw: torch.Generator, length: int = LENGTH) -> Tensor:
    return torch.randint(3, IMAGE_TOKEN, (ROWS, length), generator=draw)


def _padded(draw: torch.Generator) -> dict[str, Tensor]:
    """Rows of several lengths, as tokenizers give them."""
    mask = (torch.arange(LENGTH) < torch.tensor([LENGTH, 6, 8, LENGTH])[:, None]).long()
    return {"input_ids": _ids(draw) * mask + 1 - mask, "attention_mask": mask}


def _translation(draw: torch.Generator) -> dict[str, Tensor]:
    labels = _ids(draw, 7)
    labels[1, 5:] = -100
    return {**_padded(draw), "labels": labels}


def _classes(draw: torch.Generator) -> dict[str, Tensor]:
    return {**_padded(draw), "labels": torch.randint(0, 3, (ROWS,), generator=draw)}


def _masked(draw: torch.Generator) -> dict[str, Tensor]:
    batch = _padded(draw)
    hidden = torch.rand((ROWS, LENGTH), generator=draw) < 0.3
    labels = batch["input_ids"].masked_fill(~hidden, -100)
    return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, 4), "labels": labels}


def _spans(draw: torch.Generator) -> dict[str, Tensor]:
    ends = torch.randint(0, LENGTH, (2, ROWS), generator=draw)
    return {**_padded(draw), "start_positions": ends[0], "end_positions": ends[1]}


def _captions(draw: torch.Generator) -> dict[str, Tensor]:
    """Text behind the places of an image, whose features stand there."""
    ids = torch.cat([torch.full((ROWS, PATCHES), IMAGE_TOKEN), _ids(draw)], dim=1)
    labels = ids.masked_fill(ids == IMAGE_TOKEN, -100)
    pixels = torch.randn(ROWS, 3, 8, 8, generator=draw)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def _grids(draw: torch.Generator) -> dict[str, Tensor]:
    """As captions; an image is a row of 4 x 4 patches, of which 2 x 2 make one place."""
    batch = _captions(draw)
    batch["pixel_values"] = torch.randn(ROWS * 4 * PATCHES, 3 * 2 * 4 * 4, generator=draw)
    sight = (batch["input_ids"] == IMAGE_TOKEN).int()
    grid = torch.tensor([[1, 4, 4]] * ROWS)
    return {**batch, "image_grid_thw": grid, "mm_token_type_ids": sight}


KINDS: Mapping[str, Kind] = {
    "t5": Kind("T5ForConditionalGeneration", "t5", _T5, _translation),
    "t5, gated, untied": Kind(
        "T5ForConditionalGeneration",
        "t5",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        _translation,
    ),
    "mt5": Kind("MT5ForConditionalGeneration", "mt5", _T5, _translation),
    "umt5": Kind("UMT5ForConditionalGeneration", "umt5", _T5, _translation),
    "bart": Kind("BartForConditionalGeneration", "bart", _BART, _translation),
    "mbart": Kind("MBartForConditionalGeneration", "mbart", _BART, _translation),
    "pegasus": Kind("PegasusForConditionalGeneration", "pegasus", _BART, _translation),
    "bert, classes": Kind(
        "BertForSequenceClassification", "bert", {**_BERT, "num_labels": 3}, _classes
    ),
    "bert, masked": Kind("BertForMaskedLM", "bert", _BERT, _masked),
    "roberta, classes": Kind(
        "RobertaForSequenceClassification", "roberta", {**_BERT, "num_labels": 3}, _classes
    ),
    "roberta, masked": Kind("RobertaForMaskedLM", "roberta", _BERT, _masked),
    "electra, spans": Kind(
        "ElectraForQuestionAnswering", "electra", {**_BERT, "embedding_size": 24}, _spans
    ),
    "albert, masked": Kind("AlbertForMaskedLM", "albert", {**_BERT, "embedding_size": 24}, _masked),
    "distilbert, masked": Kind(
        "DistilBertForMaskedLM",
        "distilbert",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 32,
            **dict.fromkeys(("dropout", "attention_dropout"), 0.0),
            "initializer_range": 0.1,
        },
        _masked,
    ),
    "deberta-v2, classes": Kind(
        "DebertaV2ForSequenceClassification",
        "deberta-v2",
        {
            **_BERT,
            "num_labels": 3,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
        _classes,
    ),
    "modernbert, masked": Kind(
        "ModernBertForMaskedLM",
        "modernbert",
        {
            **_BERT,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "cls_token_id": 0,
            "sep_token_id": 2,
            "global_attn_every_n_layers": 2,
            "local_attention": 6,
            "attention_dropout": 0.0,
        },
        _masked,
    ),
    "llava": Kind(
        "LlavaForConditionalGeneration",
        "llava",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_SIGHT},
            "image_token_index": IMAGE_TOKEN,
            "image_token_id": IMAGE_TOKEN,
            "image_seq_length": PATCHES,
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -1,
            "tie_word_embeddings": False,
        },
        _captions,
    ),
    "qwen2_vl": Kind(
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        {
            "text_config": {
                "model_type": "qwen2_vl_text",
                **_TEXT,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [1, 1, 2],
                },
            },
            "vision_config": {
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": 32,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 1,
            "vision_start_token_id": 0,
            "vision_end_token_id": 2,
            "tie_word_embeddings": False,
        },
        _grids,
    ),
    "gemma3": Kind(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        {
            "text_config": {
                "model_type": "gemma3_text",
                **_TEXT,
                "head_dim": 8,
                "sliding_window": 6,
                "query_pre_attn_scalar": 8,
                "tie_word_embeddings": True,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                **_SIGHT,
                "vision_use_head": False,
            },
            "image_token_id": IMAGE_TOKEN,
            "image_token_index": IMAGE_TOKEN,
            "mm_tokens_per_image": PATCHES,
            "initializer_range": 0.1,
        },
        lambda draw: {
            **_captions(draw),
            "token_type_ids": (torch.arange(PATCHES + LENGTH) < PATCHES).long().expand(ROWS, -1),
        },
    ),
}


def build(name: str) -> nn.Module:
    """In float32, with the same weights on every rank."""
    kind = KINDS[name]
    config = transformers.AutoConfig.for_model(kind.config, **kind.sizes)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind.model)(config)
    with torch.no_grad():  # what starts at zero would hide its own gradient
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.1)
    return model.train()


def batch(name: str, step: int) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward, the same on every rank."""
    return KINDS[name].batch(torch.Generator().manual_seed(100 + step))
