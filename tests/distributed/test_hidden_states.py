# SPDX-License-Identifier: Apache-2.0
"""output_hidden_states in training, with the tokens sharded between blocks."""

from typing import cast

import pytest

from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.sequence_parallel.hidden_states import HiddenStates
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


def test_those_of_encoder_and_decoder_train_as_one_process(pool: Pool) -> None:
    for apart in pool.run(hidden_states_ranks.encoder_decoder):
        assert {name: far for name, far in apart.items() if far > 1e-13} == {}


def test_only_what_is_asked_for_is_gathered(pool: Pool) -> None:
    for none, one, both in pool.run(hidden_states_ranks.gathers):
        assert (one - none, both - none) == (1, 2)


@pytest.mark.parametrize("asked", ["", "model"])
def test_a_call_that_was_interrupted_is_forgotten_in_the_next_one(asked: str) -> None:
    states = HiddenStates(cast(TPGroup, None))
    states.begin(asked, is_asked=True)
    states.begin("model.decoder", is_asked=False)
    assert states.is_asked
    states.begin(asked, is_asked=False)
    assert not states.is_asked


def test_a_model_that_records_otherwise_is_refused_by_name(pool: Pool) -> None:
    said, other = pool.run(hidden_states_ranks.refused)
    assert said == other
    assert said.startswith(
        "ValueError: output_hidden_states with tensor_parallel.sequence_parallel: the model "
        "returns a tensor of shape [1, "
    )
