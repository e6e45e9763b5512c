# SPDX-License-Identifier: Apache-2.0
"""A model is switched over in place, back without a trace, or for good."""

import pytest

from tests.distributed import conversion_ranks
from tests.support.worker_pool import Pool


@pytest.mark.parametrize("lend", [False, True])
def test_what_was_switched_is_undone_without_a_trace(pool: Pool, lend: bool) -> None:
    assert pool.run(conversion_ranks.undone, lend) == [True, True]


def test_a_conversion_that_fails_halfway_is_undone(pool: Pool) -> None:
    assert pool.run(conversion_ranks.stopped_halfway) == [True, True]


def test_modules_get_one_attribute_and_the_model_four_methods(pool: Pool) -> None:
    for added in pool.run(conversion_ranks.left_on_modules):
        methods = {"forward", "save_pretrained", "load_adapter", "num_parameters"}
        assert added.pop("") == {"_autotp", "_loss_function", *methods}
        assert "model.layers.1.self_attn.q_proj" in added and "model.layers.0" in added
        assert added.pop("model") == methods - {"forward"}  # of a part
        assert set().union(*added.values()) == {"_autotp"}


def test_swapped_in_weights_are_views_of_the_full_ones(pool: Pool) -> None:
    for found in pool.run(conversion_ranks.swapped_in, ranks=3):
        assert len(found) == 12 and all(found.values()), found


def test_a_commit_keeps_parameters_and_frees_what_is_elsewhere(pool: Pool) -> None:
    for found in pool.run(conversion_ranks.committed):
        assert found.pop("classes") == (True, True, True)
        assert found.pop("features") == (56, 56)
        assert found.pop("runs") == (4, 12, 96)
        assert all(found.values()), found


def test_another_model_with_the_same_configuration_stays_unsharded(pool: Pool) -> None:
    for hidden, heads, same in pool.run(conversion_ranks.two_models):
        assert (hidden, heads) == (64, 1) and same
