# SPDX-License-Identifier: Apache-2.0
"""output_hidden_states in training, with the tokens sharded between blocks."""

import pytest

from tests.distributed import hidden_states_ranks
from tests.support.worker_pool import Pool

CHECKPOINTS = ["reentrant checkpoints", "other checkpoints"]


@pytest.mark.parametrize(
    ("family", "ways"),
    [
        ("llama", ["argument", "configuration", "one", *CHECKPOINTS]),
        ("bert", ["argument", *CHECKPOINTS]),
        ("gptj", ["argument", "position", *CHECKPOINTS]),
    ],
)
def test_losses_of_hidden_states_train_as_one_process(
    pool: Pool, family: str, ways: list[str]
) -> None:
    for found in pool.run(hidden_states_ranks.asked, family, ways):
        for way, apart in found.items():
            assert {name: far for name, far in apart.items() if far > 1e-13} == {}, way


def test_only_what_is_asked_for_is_gathered(pool: Pool) -> None:
    for none, one, both in pool.run(hidden_states_ranks.gathers):
        assert (one - none, both - none) == (1, 2)


def test_a_model_that_records_otherwise_is_refused_by_name(pool: Pool) -> None:
    said, other = pool.run(hidden_states_ranks.refused)
    assert said == other
    assert said.startswith(
        "ValueError: output_hidden_states with tensor_parallel.sequence_parallel: the model "
        "returns a tensor of shape [1, "
    )
