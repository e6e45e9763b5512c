# SPDX-License-Identifier: Apache-2.0
"""A sharded model takes full weights, and calls that users make of an unsharded one."""

import pytest

from tests.distributed import full_weights_ranks
from tests.support.worker_pool import Pool


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_full_weights_are_loaded_as_in_one_process(pool: Pool, family: str) -> None:
    for found in pool.run(full_weights_ranks.given, family):
        assert {way: names for way, names in found.items() if names} == {}


def test_gradients_are_clipped_by_parameters_as_torch_does(pool: Pool) -> None:
    for norms in pool.run(full_weights_ranks.clipped):
        assert all(ours == pytest.approx(expected, rel=1e-5) for ours, expected in norms), norms


def test_parameters_of_two_models_are_not_clipped_together(pool: Pool) -> None:
    for said in pool.run(full_weights_ranks.clipped_together):
        assert "got parameters of several sharded models" in said


def test_attention_maps_of_some_heads_are_an_error(pool: Pool) -> None:
    for said, heads in pool.run(full_weights_ranks.attention_maps):
        assert "attentions have 4 heads on this rank, and the model has 8" in said
        assert heads == 8


def test_an_engine_is_given_functions_and_modules(pool: Pool) -> None:
    expected = pool.run(full_weights_ranks.with_functions, 1, ranks=1)[0]
    for loss in pool.run(full_weights_ranks.with_functions, 2):
        assert loss == pytest.approx(expected, rel=1e-5)
