# SPDX-License-Identifier: Apache-2.0
"""Replicated parameters are equal from the first step on, and a check names those that are not."""

from typing import Any

import pytest
import torch

from tests.distributed import replica_check_ranks
from tests.support.worker_pool import Pool

NORM = "model.layers.1.input_layernorm.weight"
SHARED = "model.layers.0.self_attn.k_proj.weight"
SHARDED = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("names", "drifted"),
    [([NORM], [NORM]), ([SHARED], [SHARED]), ([SHARED, NORM], [SHARED, NORM])],
    ids=["a norm", "a key head on all ranks", "both"],
)
def test_a_drifted_parameter_is_named_on_every_rank(
    pool: Pool, names: list[str], drifted: list[str], ranks: int
) -> None:
    for before, after in pool.run(replica_check_ranks.drifts, names, ranks=ranks):
        assert before == "all equal"
        count = "1 parameter " if len(drifted) == 1 else f"{len(drifted)} parameters "
        assert after.startswith(count + "that several ranks hold differ")
        assert after.endswith(
            f"{list(range(ranks))} of the TP group: {', '.join(drifted)}; update what several "
            "ranks hold in the same way on each of them"
        )


def test_a_weight_that_is_sharded_may_differ(pool: Pool) -> None:
    assert pool.run(replica_check_ranks.drifts, [SHARDED]) == [["all equal", "all equal"]] * 2


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_the_check_works_on_an_engine(pool: Pool, zero: int) -> None:
    found = pool.run(replica_check_ranks.drifts_in_engine, zero, ranks=4)
    for rank, (before, after) in enumerate(found):
        assert before == "all equal"
        model = [0, 1] if rank < 2 else [2, 3]
        assert after.endswith(
            f"{model} of the TP group: model.norm.weight; update what several ranks hold in the "
            "same way on each of them"
        )


def test_ranks_with_other_weights_get_those_of_rank_0(pool: Pool) -> None:
    (said, same), *others = pool.run(replica_check_ranks.share, [3, 7, 8], 3, ranks=3)
    assert same and others == [([], True), ([], True)]
    assert len(said) == 1
    assert "the ranks [0, 1, 2] have different weights of LlamaForCausalLM" in said[0]
    assert "all take those of rank 0" in said[0]


def test_each_tp_group_gets_the_weights_of_its_own_rank_0(pool: Pool) -> None:
    found = pool.run(replica_check_ranks.share, [1, 2, 5, 5], 2, ranks=4)
    assert [same for _, same in found] == [True] * 4
    assert [len(said) for said, _ in found] == [1, 0, 0, 0]


def test_ranks_with_the_same_weights_say_nothing(pool: Pool) -> None:
    assert pool.run(replica_check_ranks.share, [4, 4], 2) == [([], True), ([], True)]


def test_ranks_have_the_same_rng_state_afterwards(pool: Pool) -> None:
    (before, first), (other, second) = pool.run(replica_check_ranks.rng_states)
    assert before != other and first == second


def test_dropout_of_replicated_activations_is_the_same_on_all_ranks(pool: Pool) -> None:
    first, second = pool.run(replica_check_ranks.dropped_output)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "residual"),
    [
        ({}, False),
        ({}, True),
        (replica_check_ranks.UNEVEN, False),
        (replica_check_ranks.UNEVEN, True),
    ],
    ids=["even", "even and residual", "uneven", "uneven and residual"],
)
def test_dropout_lets_no_replica_drift(pool: Pool, changes: dict[str, Any], residual: bool) -> None:
    (first, losses), (second, others) = pool.run(
        replica_check_ranks.train_with_dropout, changes, residual
    )
    assert (first, second) == ("all equal", "all equal")
    assert losses == others and len(set(losses)) == 4


def test_ranks_seeded_differently_are_given_one_random_state(pool: Pool) -> None:
    (first, losses, said), (second, others, nothing) = pool.run(replica_check_ranks.seeded_by_rank)
    assert (first, second) == ("all equal", "all equal")
    assert losses == others
    assert len(said) == 1 and "have different RNG states" in said[0] and nothing == []


def test_recomputation_with_uneven_ranks_drops_the_same(pool: Pool) -> None:
    for apart, same_place in pool.run(replica_check_ranks.checkpointed_dropout):
        assert apart < 1e-7 and same_place


def test_dropout_in_a_handmade_model_lets_no_replica_drift(pool: Pool) -> None:
    (first, losses), (second, others) = pool.run(replica_check_ranks.train_handmade_with_dropout)
    assert (first, second) == ("all equal", "all equal")
    assert losses == others and len(set(losses)) == 4
