# SPDX-License-Identifier: Apache-2.0
"""A step takes the gradients of its own backward passes, all of them and no older ones."""

from typing import Any

import pytest

from tests.integration import kept_gradients_ranks
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool

CPU = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.sample(3)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("ranks", "zero"),
    [
        (2, {"stage": 3}),
        (4, {"stage": 3}),
        (2, {"stage": 3, **CPU}),
        (2, {"stage": 1, **CPU}),
        (4, {"stage": 2, **CPU}),
        (4, {"stage": 1, "overlap_comm": True}),
        pytest.param(4, {"stage": 3, **CPU}, marks=pytest.mark.long),
        pytest.param(4, {"stage": 1, **CPU}, marks=pytest.mark.long),
        pytest.param(4, {"stage": 1, "overlap_comm": True, **CPU}, marks=pytest.mark.long),
        pytest.param(4, {"stage": 2, "overlap_comm": True, **CPU}, marks=pytest.mark.long),
        pytest.param(4, {"stage": 2}, marks=pytest.mark.long),
    ],
)
def test_a_block_that_a_step_leaves_out_has_gradients_of_zeros(
    pool: Pool, ranks: int, zero: dict[str, Any], accumulate: int
) -> None:
    for norm, weights in pool.run(
        kept_gradients_ranks.worst_of_steps, accumulate, zero, ranks=ranks
    ):
        assert [norm, weights] == pytest.approx([0.0, 0.0], abs=1e-6)


def test_so_it_has_where_the_rules_skip_all_of_a_model(pool: Pool) -> None:
    for norm, weights in pool.run(
        kept_gradients_ranks.worst_of_steps, 2, {"stage": 3}, False, True
    ):
        assert [norm, weights] == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("zero", [{"stage": 2}, {"stage": 3}, {"stage": 3, **CPU}])
def test_backward_passes_after_all_forwards_of_a_step_are_summed(
    pool: Pool, zero: dict[str, Any]
) -> None:
    for norm, weights in pool.run(kept_gradients_ranks.worst_of_steps, 2, zero, True):
        assert [norm, weights] == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_backward_pass_that_would_replace_the_gradients_of_a_step_is_refused(
    pool: Pool, stage: int
) -> None:
    run = kept_gradients_ranks.second_backward_before_a_step
    text = same_error(pool.run(run, {"stage": stage}, "forward"))
    assert "engine.backward: got another backward pass" in text and "engine.step()" in text
    assert set(pool.run(run, {"stage": stage}, "zero_grad")) == {"nothing"}
