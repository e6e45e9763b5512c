# SPDX-License-Identifier: Apache-2.0
"""The logits that a model returns in training are full where they are used."""

import pytest

from tests.distributed import lazy_logits_ranks
from tests.support.worker_pool import Pool


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_use_has_the_value_and_gradient_of_the_full_logits(
    pool: Pool, soft_cap: float, ranks: int
) -> None:
    for found in pool.run(lazy_logits_ranks.compare, soft_cap, ranks=ranks):
        assert {name: apart for name, apart in found.items() if not apart < 1e-12} == {}


def test_every_way_out_of_torch_gives_full_logits(pool: Pool) -> None:
    for found in pool.run(lazy_logits_ranks.ways_out):
        assert [name for name, right in found.items() if not right] == []


def test_what_is_said_of_them_gathers_nothing(pool: Pool) -> None:
    for found in pool.run(lazy_logits_ranks.facts):
        assert [name for name, right in found.items() if not right] == []


def test_one_rank_alone_can_print_them(pool: Pool) -> None:
    said = "LazyLogits([2, 5, 13], torch.float64; gathered when used)"
    assert pool.run(lazy_logits_ranks.one_rank) == [[said] * 3, []]


def test_a_gradient_that_would_be_wrong_or_lost_is_an_error(pool: Pool) -> None:
    for found in pool.run(lazy_logits_ranks.refused):
        assert "give it outputs.logits.full()" in found.pop("function")
        assert "give it outputs.logits.full()" in found.pop("reentrant")
        assert "no error" not in found.pop("assigned") + found.pop("inputs")
        assert [
            name for name, said in found.items() if "no gradient of outputs.logits" not in said
        ] == []


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_using_them_first_after_the_backward_is_an_error(pool: Pool, family: str) -> None:
    for found in pool.run(lazy_logits_ranks.too_late, family):
        assert all("before loss.backward(), take what you need" in said for said in found), found


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_was_used_before_the_backward_stays(pool: Pool, family: str) -> None:
    for found in pool.run(lazy_logits_ranks.used_in_time, family):
        assert [name for name, right in found.items() if not right] == []


def test_a_deep_copy_of_a_sharded_model_has_the_same_loss(pool: Pool) -> None:
    for found in pool.run(lazy_logits_ranks.copied):
        assert max(found.values()) < 1e-5


def test_a_loss_function_of_the_users_is_given_full_logits(pool: Pool) -> None:
    for found in pool.run(lazy_logits_ranks.replaced_loss):
        assert all(found.values()), found


def test_wrappers_that_look_for_tensors_pass_them_by(pool: Pool) -> None:
    for found in pool.run(lazy_logits_ranks.through_wrappers):
        assert all(found.values()), found


def test_keeping_logits_sharded_can_be_undone(pool: Pool) -> None:
    for found in pool.run(lazy_logits_ranks.undone):
        assert all(found.values()), found
