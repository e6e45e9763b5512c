# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy from shards is cross-entropy of the full logits."""

import pytest

from tests.distributed import cross_entropy_ranks
from tests.support.worker_pool import Pool


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(
    ("name", "loss", "gradient"),
    [("float64", 1e-12, 1e-12), ("float32", 1e-6, 1e-5), ("bfloat16", 1e-6, 1e-2)],
)
def test_shards_give_the_losses_and_gradients_of_the_full_logits(
    pool: Pool, ranks: int, name: str, loss: float, gradient: float
) -> None:
    found = pool.run(cross_entropy_ranks.against_one_process, name, 257, None, ranks=ranks)
    assert max(error for error, _, _ in found) < loss
    assert max(error for _, error, _ in found) < gradient
    assert len({bits for _, _, bits in found}) == 1, "all ranks have the same bits"


@pytest.mark.parametrize("widths", [[1, 30], [30, 1], [31, 0], [0, 31]])
def test_a_shard_may_have_any_width(pool: Pool, widths: list[int]) -> None:
    for loss, gradient, _ in pool.run(
        cross_entropy_ranks.against_one_process, "float64", 31, widths
    ):
        assert loss < 1e-12 and gradient < 1e-12


def test_many_chunks_give_what_one_gives(pool: Pool) -> None:
    assert max(pool.run(cross_entropy_ranks.in_chunks)) < 1e-12


def test_a_soft_cap_needs_no_pass_of_its_own(pool: Pool) -> None:
    for loss, gradient, said in pool.run(cross_entropy_ranks.soft_capped):
        assert loss < 1e-12 and gradient < 1e-12
        assert said == "soft_cap: got -1.0, expected a positive number, or 0 for none"


def test_an_ignored_token_has_no_loss_and_no_gradient_whatever_its_logits(pool: Pool) -> None:
    assert pool.run(cross_entropy_ranks.nothing_to_learn, ranks=3) == [(0.0, 0.0, 0.0)] * 3


def test_a_rank_may_hold_forbidden_columns_alone(pool: Pool) -> None:
    assert max(pool.run(cross_entropy_ranks.banned_columns)) < 1e-12


@pytest.mark.parametrize("label", [10, -1])
def test_a_label_outside_the_vocabulary_is_named(pool: Pool, label: int) -> None:
    expected = f"labels: got {label}, expected 0 to 9, or -100 for a token without a loss"
    assert pool.run(cross_entropy_ranks.outside, label) == [expected] * 2


def test_shapes_that_do_not_fit_are_refused(pool: Pool) -> None:
    width, labels = pool.run(cross_entropy_ranks.unfitting)[0]
    assert (
        width == "logits and labels: got shapes [2, 6] and [2], expected [tokens, 5] and [tokens]"
    )
    assert (
        labels == "logits and labels: got shapes [2, 5] and [3], expected [tokens, 5] and [tokens]"
    )


def test_another_use_of_overwritten_logits_is_autograds_error(pool: Pool) -> None:
    for said in pool.run(cross_entropy_ranks.other_user, True):
        assert "modified by an inplace operation" in said
    assert pool.run(cross_entropy_ranks.other_user, False) == ["True"] * 2


def test_a_retained_graph_keeps_its_logits(pool: Pool) -> None:
    assert pool.run(cross_entropy_ranks.twice) == [(True, True)] * 2


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_step_needs_a_fraction_of_the_logits_on_top_of_them(pool: Pool, name: str) -> None:
    for most in pool.run(cross_entropy_ranks.peak, name):
        assert most < 1.3
