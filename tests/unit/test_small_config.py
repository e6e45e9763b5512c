# SPDX-License-Identifier: Apache-2.0
"""A configuration is made small so that what holds in it goes on to hold."""

from typing import Any

import pytest
import torch

from deepspeed_autotp.interop.small_config import (
    factors,
    is_configured,
    layers_to_try,
    narrowed,
    small_model,
    with_layers,
)
from tests.support.small_models import build

LARGE: dict[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "pad_token_id": 128004,
    "eos_token_id": [128001, 128009],
}


def _meta(family: str, **changes: Any) -> Any:
    with torch.device("meta"):
        return build(family, tied=False, **changes)


def test_widths_shrink_by_one_factor_and_counts_stay() -> None:
    model = _meta("llama", **LARGE)
    config = with_layers(model, 2)
    factor = factors(config, ranks=2)[0]
    small = narrowed(config, factor, ranks=2)
    assert factor == 16
    assert (small.hidden_size, small.intermediate_size, small.head_dim) == (256, 896, 8)
    assert (small.num_attention_heads, small.num_key_value_heads) == (32, 8)
    assert (small.num_hidden_layers, small.max_position_embeddings) == (2, 2048)
    assert small.vocab_size < 2048 and small.vocab_size % 32 == 128256 % 32
    tokens = [small.pad_token_id, *small.eos_token_id]
    assert len(set(tokens)) == 3 and max(tokens) < small.vocab_size
    assert model.config.hidden_size == 4096 and model.config.num_hidden_layers == 32
    assert sum(p.numel() for p in small_model(model, small, device="meta").parameters()) < 3e6


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_what_ranks_share_equally_they_still_can(ranks: int) -> None:
    model = _meta("llama", **{**LARGE, "intermediate_size": 11008})
    for factor in factors(with_layers(model, 2), ranks=ranks):
        small = narrowed(with_layers(model, 2), factor, ranks=ranks)
        for name in ("hidden_size", "intermediate_size", "vocab_size"):
            full = vars(model.config)[name]
            assert (vars(small)[name] % ranks == 0) == (full % ranks == 0)


def test_layers_are_as_many_as_show_every_kind() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    model = _meta("gemma2", num_hidden_layers=12, layer_types=kinds * 2)
    first = next(layers_to_try(model, 16))
    assert first == 6
    assert with_layers(model, first).layer_types == kinds


def test_only_a_model_of_transformers_is_made_of_a_configuration() -> None:
    assert is_configured(_meta("llama"))
    assert not is_configured(torch.nn.Linear(2, 2))
