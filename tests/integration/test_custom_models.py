# SPDX-License-Identifier: Apache-2.0
"""Models that no library knows train through initialize with nothing but a TP size."""

import pytest

from tests.integration.custom_models_ranks import (
    groups_by_rule,
    kinds_with,
    refused_without_inputs,
    train,
)
from tests.support.custom_models import MODELS
from tests.support.worker_pool import Pool

BOUND = 1e-5


@pytest.mark.sample(2)
@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_custom_model_trains_as_in_one_process(pool: Pool, name: str, tp: int) -> None:
    for found in pool.run(train, name, tp, ranks=tp):
        assert found["worst"] < BOUND
        assert found["part"] < 1 / tp + 0.02


def test_head_counts_are_found_under_names_of_the_users_own(pool: Pool) -> None:
    [found, _] = pool.run(train, "grouped attention", 2)
    assert found["kinds"]["blocks.0.attention.to_k.weight"] == "column"
    assert found["kinds"]["blocks.0.attention.to_out.weight"] == "row"
    assert found["warnings"] == []


def test_a_wrong_guess_of_the_layout_is_found_by_the_self_check(pool: Pool) -> None:
    [found, _] = pool.run(train, "interleaved q|k|v", 2)
    [warning] = found["warnings"]
    assert "blocks.*.attention is sharded layer by layer" in warning


def test_layers_whose_weights_are_used_without_their_forward_stay_replicated(pool: Pool) -> None:
    [found, _] = pool.run(train, "uncalled layers", 2)
    assert found["worst"] < BOUND
    assert found["kinds"]["blocks.0.network.fc1.weight"] == "replicated"
    assert found["kinds"]["blocks.0.attention.to_q.weight"] == "column"
    [warning] = found["warnings"]
    assert warning.startswith("blocks.*.network.fc1, blocks.*.network.fc2 stays replicated: ")
    assert warning.endswith("blocks.*.network.fc1, blocks.*.network.fc2 never ran")


@pytest.mark.parametrize("name", ["tied by its weight", "penalized weight"])
def test_a_weight_that_the_model_uses_itself_stays_whole(pool: Pool, name: str) -> None:
    [found, _] = pool.run(train, name, 2)
    assert found["worst"] < BOUND
    assert found["kinds"]["blocks.0.attention.to_out.weight"] == "row"
    [warning] = found["warnings"]
    assert warning.startswith("embedding stays replicated: ")
    assert "the model uses the weight of embedding itself" in warning


@pytest.mark.parametrize("tp", [2, 4])
def test_a_rule_shards_a_projection_of_groups_of_queries_key_and_value(pool: Pool, tp: int) -> None:
    for kinds, difference in pool.run(groups_by_rule, "num_key_value_heads", ranks=tp):
        assert kinds == [
            "blocks.0.attention.wqkv.weight: column",
            "blocks.0.attention.wo.weight: row",
        ]
        assert difference < BOUND
    for error in pool.run(groups_by_rule, "groups_of_heads", ranks=tp):
        assert "groups_of_heads (6)" in error
        assert "those called num_heads, num_key_value_heads" in error


def test_a_model_of_unknown_names_alone_is_sharded_individually_and_that_is_said(
    pool: Pool,
) -> None:
    [found, _] = pool.run(train, "two linears", 2)
    assert any("has no layers whose names are known" in text for text in found["warnings"])
    assert found["kinds"]["blocks.0.network.q.weight"] == "column"


def test_without_inputs_the_error_says_what_to_pass(pool: Pool) -> None:
    for text in pool.run(refused_without_inputs):
        assert "pass example_inputs, keyword arguments of its forward, to initialize" in text


@pytest.mark.parametrize(
    "way", ["example_inputs", "data set of tuples", "data set of dictionaries", "collate_fn"]
)
def test_inputs_come_by_keyword_or_from_the_training_data(pool: Pool, way: str) -> None:
    for kinds in pool.run(kinds_with, way):
        assert kinds == ["column", "column", "row", "replicated"]
