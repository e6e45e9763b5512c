# SPDX-License-Identifier: Apache-2.0
"""Small encoders, encoder-decoders, and models that see or hear, in the sizes of a case."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.prove.case import Case
from tests.support.prove.families import checkpoint_family

LABELS = 3
PIXELS = 8  # of an image's side
BANDS, FRAMES = 8, 16  # of sound

Inputs = Callable[[Tensor, Tensor, torch.dtype], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Encoder:
    """A class of transformers, its model type, options besides the sizes, and how its inputs are
    made of tokens and targets."""

    model: str
    type: str
    inputs: Inputs
    options: Mapping[str, Any] = field(default_factory=dict)


def _padded(ids: Tensor, targets: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The last token of each second row is none."""
    mask = torch.ones_like(ids)
    mask[1::2, -1] = 0
    return {"input_ids": ids.clamp(min=3), "attention_mask": mask}


def _masked(ids: Tensor, targets: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    hidden = ids % 3 == 0
    hidden[:, 0] = True
    inputs = _padded(ids.masked_fill(hidden, 4), targets, dtype)
    return {**inputs, "labels": ids.clamp(min=3).masked_fill(~hidden, -100)}


def _classes(ids: Tensor, targets: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return {**_padded(ids, targets, dtype), "labels": targets[:, 0] % LABELS}


def _translation(ids: Tensor, targets: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return {**_padded(ids, targets, dtype), "labels": targets[:, 1:].clamp(min=3)}


def _drawn(ids: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers between -1 and 1 that follow from the tokens of a row."""
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    rows = ids.double() @ torch.arange(1, ids.shape[1] + 1, dtype=torch.float64)
    return torch.sin(places * (1 + rows[:, None] % 17)).unflatten(1, shape).to(dtype)


def _images(ids: Tensor, targets: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    pixels = _drawn(ids, (3, PIXELS, PIXELS), dtype)
    return {"pixel_values": pixels, "labels": targets[:, 0] % LABELS}


def _captions(ids: Tensor, targets: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    pixels = _drawn(ids, (3, PIXELS, PIXELS), dtype)
    inputs = {**_padded(ids, targets, dtype), "pixel_values": pixels}
    return {**inputs, "return_loss": True}  # type: ignore[dict-item]


def _speech(ids: Tensor, targets: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    features = _drawn(ids, (BANDS, FRAMES), dtype)
    return {"input_features": features, "labels": targets.clamp(min=3)}


_T5: Mapping[str, Any] = {"decoder_start_token_id": 0}
_GATED: Mapping[str, Any] = {
    **_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
_DEBERTA: Mapping[str, Any] = {
    "relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True, "norm_rel_ebd": "layer_norm",
}  # fmt: skip
KINDS: Mapping[str, Encoder] = {
    "bert": Encoder("BertForMaskedLM", "bert", _masked),
    "bert classes": Encoder("BertForSequenceClassification", "bert", _classes),
    "roberta": Encoder("RobertaForMaskedLM", "roberta", _masked),
    "roberta classes": Encoder("RobertaForSequenceClassification", "roberta", _classes),
    "distilbert": Encoder("DistilBertForMaskedLM", "distilbert", _masked),
    "electra": Encoder("ElectraForMaskedLM", "electra", _masked),
    "albert": Encoder("AlbertForMaskedLM", "albert", _masked),
    "deberta-v2": Encoder("DebertaV2ForSequenceClassification", "deberta-v2", _classes, _DEBERTA),
    "modernbert": Encoder("ModernBertForMaskedLM", "modernbert", _masked),
    "t5": Encoder("T5ForConditionalGeneration", "t5", _translation, _T5),
    "gated t5": Encoder("T5ForConditionalGeneration", "t5", _translation, _GATED),
    "bart": Encoder("BartForConditionalGeneration", "bart", _translation),
    "mbart": Encoder("MBartForConditionalGeneration", "mbart", _translation),
    "pegasus": Encoder("PegasusForConditionalGeneration", "pegasus", _translation),
    "marian": Encoder("MarianMTModel", "marian", _translation),
    "whisper": Encoder("WhisperForConditionalGeneration", "whisper", _speech),
    "vit": Encoder("ViTForImageClassification", "vit", _images),
    "clip": Encoder("CLIPModel", "clip", _captions),
    "siglip": Encoder("SiglipModel", "siglip", _captions),
}
_TWO_TOWERS = ("clip", "siglip")


def sizes(case: Case) -> dict[str, Any]:
    """Under all names that some configuration has for them; without any dropout."""
    heads, layers, inner = case.heads, case.layers, case.inner
    hidden = heads * case.head_size
    names = {
        "hidden_size": hidden, "d_model": hidden, "dim": hidden,
        "intermediate_size": inner, "d_ff": inner, "hidden_dim": inner,
        "encoder_ffn_dim": inner, "decoder_ffn_dim": inner,
        "num_hidden_layers": layers, "num_layers": layers, "n_layers": layers,
        "encoder_layers": layers, "decoder_layers": layers,
        "num_attention_heads": heads, "num_heads": heads, "n_heads": heads,
        "encoder_attention_heads": heads, "decoder_attention_heads": heads,
        "d_kv": case.head_size, "embedding_size": 12,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
        "vocab_size": case.vocabulary, "max_position_embeddings": 32,
        "max_target_positions": 32, "max_source_positions": FRAMES // 2,
        "image_size": PIXELS, "patch_size": 4, "num_mel_bins": BANDS, "num_labels": LABELS,
        "projection_dim": 10, "local_attention": 4, "global_attn_every_n_layers": 2,
    }  # fmt: skip
    dropouts = (
        "hidden_dropout_prob attention_probs_dropout_prob dropout attention_dropout dropout_rate "
        "activation_dropout classifier_dropout embedding_dropout mlp_dropout seq_classif_dropout "
        "encoder_layerdrop decoder_layerdrop"
    )
    return {**names, **dict.fromkeys(dropouts.split(), 0.0)}


_TOKENS = {
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
    "cls_token_id": 0, "sep_token_id": 2, "forced_eos_token_id": None,
    "begin_suppress_tokens": None, "suppress_tokens": None,
}  # fmt: skip


def make_encoder(case: Case) -> nn.Module:
    """A model of the case's kind; what a configuration does not know is left out."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = KINDS[case.family]
    plain = CONFIG_MAPPING[kind.type]()

    def known(config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        names = {*config.to_dict(), *config.attribute_map, "num_labels"}
        return {name: value for name, value in options.items() if name in names}

    own = {**sizes(case), **_TOKENS}
    if case.family in _TWO_TOWERS:
        towers = {
            name: known(getattr(plain, name), own) for name in ("text_config", "vision_config")
        }
        options = {**towers, "projection_dim": 10}
    else:
        options = known(plain, {**own, "tie_word_embeddings": case.tied == "weight"})
    config = transformers.AutoConfig.for_model(kind.type, **{**options, **kind.options})
    with torch.random.fork_rng([]):
        model: nn.Module = getattr(transformers, kind.model)(config)
    checkpoint_family(case, model)
    return model


def encoder_inputs(case: Case, model: Any, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    dtype = next(iter(model.parameters())).dtype
    return KINDS[case.family].inputs(ids, targets, dtype)
