# SPDX-License-Identifier: Apache-2.0
"""A plan that cannot be is refused by name, with the model unchanged; one that a model brings along
with entries that match nothing is warned of once, and the model trains right."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.distributed import bad_plans_ranks
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool


@dataclass(frozen=True)
class Bad:
    """A family, what its plan and its configuration are changed by, the ranks, and words of the
    message."""

    words: list[str]
    family: str = "llama"
    tied: bool = False
    styles: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    specs: list[dict[str, Any]] = field(default_factory=list)
    ranks: int = 2

    def arguments(self) -> tuple[Any, ...]:
        return self.family, self.tied, self.styles, self.changes, self.specs


def _spec(pattern: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"patterns": [pattern], "partition_type": kind, **more}


REFUSED = {
    "a style nobody knows": Bad(
        ["'model.layers.*.mlp.up_proj'", "'colwize'", "did you mean 'colwise'"],
        styles={"model.layers.*.mlp.up_proj": "colwize"},
    ),
    "an entry of a plan of one's own that matches nothing": Bad(
        [
            "model.layers.*.mlp.up_porj",
            "matches nothing",
            "did you mean 'model.layers.*.mlp.up_proj'",
        ],
        styles={"model.layers.*.mlp.up_porj": "colwise"},
    ),
    "a tied tensor that two rules shard along two dimensions": Bad(
        ["model.embed_tokens.weight", "layer_specs[0]", "lm_head.weight", "layer_specs[1]"],
        tied=True,
        specs=[_spec(r".*embed_tokens", "column"), _spec(r"lm_head", "column")],
    ),
    "pieces that do not add up": Bad(
        ["model.layers.0.self_attn.qkv_proj.weight", "layer_specs[0]", "100", "128"],
        family="phi3",
        changes={"pad_token_id": 0},
        specs=[_spec(r".*qkv_proj", "column", shape=[[64, 32, 4], -1])],
    ),
    "equal pieces that do not divide": Bad(
        ["model.layers.0.mlp.gate_up_proj.weight", "layer_specs[0]", "224", "3"],
        family="phi3",
        changes={"pad_token_id": 0},
        specs=[_spec(r".*gate_up_proj", "column", shape=[3, -1])],
    ),
    "fewer heads than ranks under rules": Bad(
        ["model.layers.0.self_attn", "2 query and 2 key/value heads", "use a TP size that fits"],
        changes={"num_attention_heads": 2, "num_key_value_heads": 2},
        specs=[_spec(r".*[qkv]_proj", "column"), _spec(r".*o_proj", "row")],
        ranks=4,
    ),
    "fewer heads than ranks under the model's plan": Bad(
        ["model.layers.0.self_attn", "2 query and 2 key/value heads", "use a TP size that fits"],
        changes={"num_attention_heads": 2, "num_key_value_heads": 2},
        ranks=4,
    ),
}

WARNED = {
    "a pattern that matches nothing": Bad(
        ["layer_specs[2]", "matches nothing", "up_proj"],
        specs=[
            _spec(r".*[qkv]_proj\.weight", "column"),
            _spec(r".*o_proj\.weight", "row"),
            _spec(r".*up_porj\.weight", "column"),
        ],
    ),
    "a tied tensor that the model's plan shards along two dimensions": Bad(
        ["model.embed_tokens.weight", "lm_head.weight", "one tensor"],
        tied=True,
        styles={
            "model.embed_tokens": "embedding_colwise",
            "lm_head": "colwise_gather_output",
        },
    ),
    "fewer heads than ranks in a family known by its names": Bad(
        ["transformer.h.*.attn.c_proj", "full", "heads"],
        family="gpt2",
        changes={
            "n_embd": 64,
            "n_head": 2,
            "n_layer": 2,
            "n_inner": 112,
            "n_positions": 64,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
        ranks=4,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_name(pool: Pool, name: str) -> None:
    bad = REFUSED[name]
    text = same_error(pool.run(bad_plans_ranks.refused, *bad.arguments(), ranks=bad.ranks))
    assert text.startswith("ValueError: ")
    assert [word for word in bad.words if word not in text] == [], text


@pytest.mark.parametrize("name", WARNED)
def test_what_a_plan_says_too_much_is_warned_of_once(pool: Pool, name: str) -> None:
    bad = WARNED[name]
    found = pool.run(bad_plans_ranks.warned, *bad.arguments(), ranks=bad.ranks, timeout=110)
    texts = [text for said, _ in found for text in said]
    assert len(texts) == 1, texts
    assert [word for word in bad.words if word not in texts[0]] == [], texts
    assert max(apart for _, apart in found) < 1e-5


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_small_tower_with_fewer_heads_than_ranks_stays_replicated(
    pool: Pool, sequence_parallel: bool
) -> None:
    found = pool.run(bad_plans_ranks.with_small_tower, sequence_parallel, ranks=4, timeout=110)
    said = [text for texts, _, _ in found for text in texts]
    assert said == [
        "tower.layers.*.self_attn stays replicated: it has 3 query and 3 key/value heads, and "
        "cannot be sharded over 4 ranks"
    ]
    for _, apart, sharded in found:
        assert apart < 1e-5
        assert sharded == [
            f"tower.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
        ]


@pytest.mark.parametrize("older", [False, True])
def test_a_rule_for_what_weight_norm_computes_a_weight_from_is_refused(
    pool: Pool, older: bool
) -> None:
    message = same_error(pool.run(bad_plans_ranks.refused_for_weight_norm, older))
    for words in ("up_proj", "layer_specs[0]", "a parametrization of torch.nn.utils"):
        assert words in message
