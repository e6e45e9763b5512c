# SPDX-License-Identifier: Apache-2.0
"""A plain training loop around ``parallelize`` does what the same loop does in one process."""

import pytest

from tests.distributed import training_ranks
from tests.support.large_differences import large_differences
from tests.support.training_loops import SHAPES
from tests.support.worker_pool import Pool


@pytest.mark.sample(2)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_equals_one_process_for_every_shape(pool: Pool, shape: str, ranks: int) -> None:
    for found, shares in pool.run(training_ranks.compare_shape, shape, ranks=ranks):
        assert shares == (ranks > SHAPES[shape].get("num_key_value_heads", 4))
        assert large_differences(found) == {}


def test_training_beside_data_parallel_equals_one_process(pool: Pool) -> None:
    for found in pool.run(training_ranks.compare_with_data_parallel, ranks=4):
        assert set(found) == {"loss", "norm", "weights", "replicas"}
        assert large_differences(found) == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_equals_one_process(pool: Pool, reentrant: bool) -> None:
    for found in pool.run(training_ranks.compare_checkpointed, reentrant):
        assert large_differences(found) == {}


def test_gradient_accumulation_equals_one_process(pool: Pool) -> None:
    for found in pool.run(training_ranks.compare, {"num_key_value_heads": 1}, 2):
        assert large_differences(found) == {}


@pytest.mark.parametrize("ranks", [2, 4])
def test_frozen_weights_stay_and_train_right_once_thawed(pool: Pool, ranks: int) -> None:
    for kept, frozen, thawed in pool.run(training_ranks.compare_frozen, ranks=ranks):
        assert kept
        assert large_differences(frozen) == {} and large_differences(thawed) == {}


@pytest.mark.parametrize("sequence", [False, True], ids=["tokens full", "tokens sharded"])
def test_autocast_stays_near_one_process(pool: Pool, sequence: bool) -> None:
    for within, before in pool.run(training_ranks.compare_autocast, sequence):
        assert within < 2e-3 and before < 2e-3
