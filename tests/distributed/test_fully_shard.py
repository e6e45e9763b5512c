# SPDX-License-Identifier: Apache-2.0
"""torch's fully_shard over the data-parallel mesh of a sharded model trains as one process does."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.fully_shard_ranks import (
    adapted,
    compiled,
    infinite_on_one_rank,
    layers_alone,
    mixed_precision,
    refusals,
    through_the_backbone,
    train,
    train_one,
    unfrozen_late,
    with_labels,
    wrapped_late,
)
from tests.support.worker_pool import Pool

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@pytest.mark.parametrize(
    ("family", "changes", "accumulate", "syncs"),
    [
        ("qwen3", {"tied": True}, 1, True),
        ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}, 3, False),
        ("phi3", {"num_key_value_heads": 1}, 3, True),
        ("qwen3_moe", EXPERTS, 1, True),
    ],
    ids=["q/k norms, tied", "one key head", "fused", "experts"],
)
def test_losses_norms_and_weights_are_those_of_one_process(
    pool: Pool, family: str, changes: dict[str, Any], accumulate: int, syncs: bool
) -> None:
    """In float64, with gradients accumulated with and without reducing each."""
    losses, norms, weights = pool.run(train_one, family, changes, accumulate, ranks=1)[0]
    for result in pool.run(train, family, changes, accumulate, syncs, 2, ranks=4):
        assert result[0] == pytest.approx(losses, rel=1e-9)
        assert result[1] == pytest.approx(norms, rel=1e-9)
        assert result[2].keys() == weights.keys()
        assert max(float((result[2][n] - t).abs().max()) for n, t in weights.items()) < 1e-9


def test_a_loss_of_sharded_logits_is_that_of_one_process(pool: Pool) -> None:
    for expected, losses in pool.run(with_labels, ranks=4):
        assert losses == pytest.approx(expected, rel=1e-5)


def test_parameters_are_in_the_data_type_of_mixed_precision(pool: Pool) -> None:
    for expected, loss in pool.run(mixed_precision, ranks=4):
        assert loss == pytest.approx(expected, rel=1e-2)


def test_gradients_are_summed_also_where_the_model_ran_before_and_in_a_copy(pool: Pool) -> None:
    assert all(max(apart) < 1e-9 for apart in pool.run(wrapped_late, ranks=4))


def test_gradients_are_summed_in_any_forward_and_a_penalty_counts_once(pool: Pool) -> None:
    assert max(pool.run(through_the_backbone, ranks=4)) < 1e-8


def test_the_model_itself_need_not_be_fully_sharded(pool: Pool) -> None:
    assert max(pool.run(layers_alone, ranks=4)) < 1e-8


def test_gradients_of_parameters_that_were_frozen_at_first_are_summed(pool: Pool) -> None:
    assert max(pool.run(unfrozen_late, ranks=4)) < 1e-9


@pytest.mark.parametrize("order", ["before", "after", "merged"])
def test_adapters_around_sharding_train_as_in_one_process(pool: Pool, order: str) -> None:
    for apart, said in pool.run(adapted, order, ranks=4):
        assert apart < 1e-9
        assert said.startswith("ValueError") and "got Adafactor" in said


def test_a_step_with_an_infinite_gradient_on_one_rank_is_skipped_on_all(pool: Pool) -> None:
    assert pool.run(infinite_on_one_rank, ranks=4) == [[65536.0, 32768.0, 32768.0]] * 4


def test_compiled_layers_train_as_one_process(pool: Pool) -> None:
    assert max(pool.run(compiled, timeout=180)) < 1e-9


def test_what_would_train_wrongly_is_refused_by_name(pool: Pool, tmp_path: Path) -> None:
    results = pool.run(refusals, str(tmp_path), ranks=4)
    found = {key: {each[key] for each in results} for key in results[0]}
    for key, words in {
        "scale of the model": "fully_shard: the gradient of scale is summed over the TP group",
        "adapters, their model is gone": "keep that module, as get_peft_model returns it",
        "adapters after": "fully_shard has partitioned the weights",
        "save_pretrained": "got a model with fully_shard",
        "gather_params": "got a parameter of a model with fully_shard",
        "gather_params, head": "got a parameter of a model with fully_shard",
        "gather_params, weight": "got a parameter of a model with fully_shard",
        "full_state_dict, backbone": "Qwen3Model is a part of a sharded FSDPQwen3ForCausalLM",
        "mesh": "fully_shard: mesh: got one with the ranks",
        "mesh, clip": "have different shards in one TP group",
    }.items():
        assert all(t.startswith("ValueError") and words in t for t in found[key]), found[key]
