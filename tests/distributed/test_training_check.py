# SPDX-License-Identifier: Apache-2.0
"""The self-check runs what training runs, and looks closely enough to see small faults."""

from typing import Any

import pytest
import torch

from tests.distributed import training_check_ranks
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.mark.sample(2)
@DTYPES
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("wrong_head", "the output of model.layers.1.self_attn.o_proj differs"),
        ("repeated_bias", "the output of model.layers.1.self_attn.o_proj differs"),
        ("missing_sum", "the gradient of model.layers.1.self_attn.k_norm.weight"),
        ("other_router_loss", "the model's loss differs"),
        (
            "misplaced_dropout",
            "dropout or other random numbers in outer are drawn anew on each rank",
        ),
    ],
)
@pytest.mark.parametrize("self_check", ["auto", True])
def test_a_fault_of_training_is_found(
    pool: Pool, fault: str, words: str, dtype: torch.dtype, self_check: Any
) -> None:
    run = f"{training_check_ranks.__name__}:{fault}"
    assert words in same_error(pool.run(run, dtype, self_check))


@DTYPES
def test_dropout_where_it_may_be_is_accepted(pool: Pool, dtype: torch.dtype) -> None:
    assert pool.run(training_check_ranks.dropout_in_place, dtype) == [[], []]


@DTYPES
def test_a_shard_of_the_logits_used_as_full_has_them_gathered(
    pool: Pool, dtype: torch.dtype
) -> None:
    first, second = pool.run(training_check_ranks.shard_as_full, dtype)
    for apart, _, is_sharded in (first, second):
        assert apart < (1e-5 if dtype is torch.float32 else 1e-2)
        assert not is_sharded
    assert len(first[1]) == 1 and second[1] == []
    assert first[1][0].startswith("the logits are gathered for the loss: the ")


def test_sharded_logits_that_were_asked_for_and_differ_are_an_error(pool: Pool) -> None:
    text = same_error(pool.run(training_check_ranks.shard_as_full_on_request))
    assert "tensor_parallel.vocab_parallel_lm_head: got true, but " in text
    assert "leave the key out" in text


def test_logits_are_gathered_also_under_rules_of_the_user(pool: Pool) -> None:
    for warnings, is_sharded in pool.run(training_check_ranks.shard_as_full_under_rules):
        assert not is_sharded
        assert len(warnings) <= 1


@DTYPES
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_dropout": 0.2}),
        ("gemma2", {"final_logit_softcapping": 5.0}),
        (
            "mixtral",
            {
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "router_jitter_noise": 0.1,
                "output_router_logits": True,
                "sliding_window": None,
            },
        ),
    ],
)
def test_what_is_random_in_training_makes_no_difference(
    pool: Pool, family: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    assert pool.run(training_check_ranks.accepted, family, dtype, changes) == [[], []]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wrong_head_is_found_where_a_model_runs_in_one_data_type_only(
    pool: Pool, dtype: torch.dtype
) -> None:
    run = training_check_ranks.wrong_head_in_one_type
    assert "the output of model.layers.1.self_attn.o_proj differs" in same_error(
        pool.run(run, dtype, True)
    )
    assert pool.run(run, dtype, False) == ["accepted"] * 2
