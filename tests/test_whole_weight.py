# SPDX-License-Identifier: Apache-2.0
"""A loss that multiplies by the output head's weight itself trains as in one process."""

import pytest

from tests import past_head
from tests.pool import Pool


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("forward", ["fused", "plain"])
def test_loss_and_gradients_equal_one_process(
    pool: Pool, forward: str, tied: bool, bias: bool, ranks: int
) -> None:
    for loss, gradients in pool.run(past_head.against_whole, forward, tied, bias, ranks=ranks):
        assert loss < 1e-6 and gradients < 1e-5


def test_what_a_weight_says_of_itself_costs_nothing(pool: Pool) -> None:
    for found in pool.run(past_head.asked):
        assert found == {"gathers": 0, "whole": True, "part": True, "printed": True}


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_zero_stage_trains_alike(pool: Pool, zero: int) -> None:
    assert max(pool.run(past_head.with_engine, zero)) < 1e-5


def test_a_compiled_model_gathers_the_weight_within_its_graph(pool: Pool) -> None:
    for loss, gradients, breaks in pool.run(past_head.compiled, timeout=110):
        assert loss < 1e-6 and gradients < 1e-5 and breaks == 0
