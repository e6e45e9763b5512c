# SPDX-License-Identifier: Apache-2.0
"""Every documented way to ask for tensor parallelism trains as one process does."""

from typing import Any

import pytest

from tests.integration.initialize_ranks import (
    LLAMA,
    PHI3,
    documented_example,
    kinds_of_shards,
    local_config,
    train_form,
    train_section,
)
from tests.support.worker_pool import Pool

BOUND = 1e-5
RANKS = pytest.mark.parametrize(("tp", "ranks"), [(2, 2), (4, 4), (2, 4)], ids=["2", "4", "2x2"])


def train(pool: Pool, family: str, tp: int, ranks: int, section: dict[str, Any] | None) -> None:
    for worst in pool.run(train_section, family, tp, section, "fp32", ranks=ranks, timeout=110):
        assert worst < BOUND


@RANKS
def test_tp_model_init_alone_asks_for_it(pool: Pool, tp: int, ranks: int) -> None:
    train(pool, "llama", tp, ranks, None)


@RANKS
def test_the_configuration_alone_asks_for_it(pool: Pool, tp: int, ranks: int) -> None:
    train(pool, "llama", tp, ranks, {"autotp_size": tp})


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("family", "preset"),
    [("llama", "llama"), ("qwen2", "qwen2"), ("phi3", "phi3"), ("llama", "LLaMA")],
)
@pytest.mark.parametrize("tp", [2, 4])
def test_a_preset_shards_its_family(pool: Pool, family: str, preset: str, tp: int) -> None:
    train(pool, family, tp, tp, {"autotp_size": tp, "preset_model": preset})


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(("family", "rules"), [("llama", LLAMA), ("phi3", PHI3)])
def test_rules_of_the_user_shard_the_model(
    pool: Pool, family: str, rules: dict[str, Any], tp: int
) -> None:
    train(pool, family, tp, tp, {"autotp_size": tp, "partition_config": rules})


def test_patterns_without_the_word_weight_decide_over_the_layers(pool: Pool) -> None:
    section = {"autotp_size": 2, "partition_config": LLAMA}
    for kinds in pool.run(kinds_of_shards, "llama", section):
        column = ("column", "layer_specs[1]", "partition_config")
        assert kinds["model.layers.1.mlp.up_proj.weight"] == column
        assert kinds["model.layers.1.self_attn.o_proj.weight"][0] == "row"
        assert kinds["model.embed_tokens.weight"][2] == "default"


def test_attention_that_reads_the_configuration_sees_its_own_heads(pool: Pool) -> None:
    for seen in pool.run(local_config):
        assert seen == {
            "heads of the model": 8,
            "heads of this rank": 4,
            "key heads of this rank": 2,
            "set later": 0.25,
            "same class": True,
            "copied": 4,
            "saved": 8,
        }


@pytest.mark.parametrize("form", ["dict", "path", "pathlib", "base64", "args", "config_params"])
def test_the_configuration_comes_in_every_form(pool: Pool, form: str) -> None:
    for worst in pool.run(train_form, form, timeout=110):
        assert worst < BOUND


def test_the_documented_example_trains(pool: Pool) -> None:
    losses = pool.run(documented_example, ranks=4, timeout=110)
    assert all(loss == losses[0] for loss in losses)
    assert losses[0][1] == losses[0][1] > 0
