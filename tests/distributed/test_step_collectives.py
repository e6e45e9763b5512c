# SPDX-License-Identifier: Apache-2.0
"""A training step has the collectives that it needs, and its layers add little to the graph."""

import pytest

from tests.distributed import step_collectives_ranks
from tests.support.worker_pool import Pool

LAYERS = 2


@pytest.mark.parametrize(
    ("family", "tied", "norms"), [("llama", False, 0), ("gemma2", True, 0), ("qwen3", False, 2)]
)
def test_a_layer_has_two_sums_each_way_and_a_step_three_calls_more(
    pool: Pool, family: str, tied: bool, norms: int
) -> None:
    expected = (
        # The embedding, and the numbers that make up the loss.
        {"all-reduce": 2 * LAYERS + 1, "all-gather": 1},
        # The head's input; and the norms that each rank uses for its own heads.
        {"all-reduce": (2 + norms) * LAYERS + 1},
    )
    for forward, backward, again in pool.run(step_collectives_ranks.of_step, family, tied):
        assert (forward, backward) == expected
        assert again == backward


@pytest.mark.parametrize("bias", [False, True], ids=["bare", "bias"])
def test_a_layer_adds_at_most_two_nodes_to_the_graph(pool: Pool, bias: bool) -> None:
    for found in pool.run(step_collectives_ranks.nodes, bias):
        assert len(found) == 3
        for name, (ours, plain) in found.items():
            # A column layer has its own two in place of nn.Linear's.
            assert 0 < ours <= (plain + 2 if name == "row" else 2)
