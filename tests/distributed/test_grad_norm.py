# SPDX-License-Identifier: Apache-2.0
"""The gradient norm of a sharded model is that of the unsharded one, and clips alike."""

import math
from typing import Any

import pytest
import torch

from tests.distributed import grad_norm_ranks
from tests.support.worker_pool import Pool

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "shared heads": {"num_key_value_heads": 1},
    "uneven": {"num_key_value_heads": 2, "vocab_size": 101},
}
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_weight_counts_once(pool: Pool, shape: str, ranks: int) -> None:
    for found in pool.run(grad_norm_ranks.clip, torch.float64, 0.5, SHAPES[shape], ranks=ranks):
        assert found["norm"] < 1e-12 and found["gradients"] < 1e-12


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_norm_has_the_width_of_the_sum(pool: Pool, dtype: torch.dtype) -> None:
    for found in pool.run(grad_norm_ranks.clip, dtype, 0.5, {}):
        assert found["dtype"] is (torch.float64 if dtype is torch.float64 else torch.float32)
        assert found["shape"] == ()
        assert found["norm"] < BOUNDS[dtype] and found["gradients"] < BOUNDS[dtype]


@pytest.mark.parametrize("most", [1e6, math.inf])
def test_a_norm_below_the_bound_changes_nothing(pool: Pool, most: float) -> None:
    for found in pool.run(grad_norm_ranks.clip, torch.float64, most, {}):
        assert found["gradients"] < 1e-12 and found["norm"] < 1e-12


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_shows_on_every_rank(pool: Pool, value: float) -> None:
    for unsharded, sharded, alike in pool.run(grad_norm_ranks.not_finite, value):
        assert repr(unsharded) == repr(sharded) == repr(value)
        assert all(alike)


def test_missing_gradients_and_later_weights_count_as_in_one_process(pool: Pool) -> None:
    for unsharded, sharded in pool.run(grad_norm_ranks.later):
        assert sharded == pytest.approx(unsharded, rel=1e-12)


def test_a_model_with_a_sharded_submodule_counts_all_of_itself(pool: Pool) -> None:
    for unsharded, sharded, same, text in pool.run(grad_norm_ranks.around):
        assert sharded == pytest.approx(unsharded, rel=1e-12) and same
        assert text.startswith("2 submodules of ModuleList are sharded")


def test_without_gradients_the_norm_is_zero_and_an_unsharded_model_is_clipped(pool: Pool) -> None:
    assert pool.run(grad_norm_ranks.empty) == [(0.0, True)] * 2
