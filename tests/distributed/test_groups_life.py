# SPDX-License-Identifier: Apache-2.0
"""Process groups are made while a model is sharded, and go with it."""

import pytest

from tests.distributed import groups_life_ranks
from tests.support.worker_pool import Pool

# Exchanges of objects over all ranks of a run, each one all-gather: a start on many ranks pays for
# each.
MOST_EXCHANGES = 4


@pytest.mark.parametrize(
    "how", ["parallelize", "initialize", "sequence parallel", "fallback", "scatter"]
)
def test_few_exchanges_are_over_all_ranks(pool: Pool, how: str) -> None:
    found = pool.run(groups_life_ranks.exchanges, how, ranks=4)
    assert len(set(found)) == 1 and 0 < found[0] <= MOST_EXCHANGES


@pytest.mark.parametrize("device", [False, True], ids=["CPU group", "group without CPU tensors"])
def test_groups_are_made_while_sharding_only(pool: Pool, device: bool) -> None:
    for sharding, training, checking in pool.run(
        groups_life_ranks.groups_while_training, device, ranks=4
    ):
        assert sharding > 0
        assert (training, checking) == (0, 0)


def test_weights_on_some_ranks_are_refused_before_a_group_is_made(pool: Pool) -> None:
    for said, groups in pool.run(groups_life_ranks.groups_of_refusal, ranks=4):
        assert "on rank 2, which is TP rank 0 of a TP group" in said
        assert groups == 0


def test_checks_of_replicas_leave_nothing_open(pool: Pool) -> None:
    for before, after in pool.run(groups_life_ranks.left_by_checks, 20):
        assert after == before


@pytest.mark.parametrize(
    "how",
    [
        "destroyed",
        "collected",
        "collected at another time",
        "refused",
        "engine",
        "failed engine",
    ],
)
def test_a_model_leaves_nothing_open(pool: Pool, how: str) -> None:
    for before, after in pool.run(groups_life_ranks.lives, how, 5):
        assert after == before


def test_a_model_of_an_ended_run_keeps_no_group_of_this_one(pool: Pool) -> None:
    pool.run(groups_life_ranks.left_models, 5)
    try:
        for before, after in pool.run(groups_life_ranks.lives, "collected", 5):
            assert after == before
    finally:
        pool.run(groups_life_ranks.left_models, 0)


def test_an_engine_that_python_collects_closes_nothing(pool: Pool) -> None:
    for before, after in pool.run(groups_life_ranks.collected_engine):
        assert after == pytest.approx(before, abs=1e-6)


def test_a_destroyed_copy_leaves_its_original_alone(pool: Pool) -> None:
    for losses, said in pool.run(groups_life_ranks.copies, ranks=4):
        assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
        for text in said[:3]:
            assert text.startswith("RuntimeError: the process groups of this sharded model were ")
        assert said[3].startswith("ValueError: LlamaForCausalLM is not sharded")


def test_a_group_of_the_user_stays_open(pool: Pool) -> None:
    for losses, there, left in pool.run(groups_life_ranks.given_group, ranks=4):
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        assert there and left == 0


def test_a_model_goes_on_in_another_engine(pool: Pool) -> None:
    for losses in pool.run(groups_life_ranks.engines):
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_tensors_are_moved_on_their_device(pool: Pool) -> None:
    for found in pool.run(groups_life_ranks.by_device):
        assert found == ["cpu"] * 4 + ["meta"] * 4 + ["[2.0]"]


def test_groups_that_plan_differently_check_together(pool: Pool) -> None:
    (plan, said), *others = pool.run(groups_life_ranks.other_replica, ranks=4)
    assert [other for other, _ in others] == [plan] * 3
    assert any("mlp" in text and "on rank 2, 3 of 4" in text for text in said)
