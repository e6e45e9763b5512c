# SPDX-License-Identifier: Apache-2.0
"""With tokens sharded between blocks, they stay so up to the loss, which gathers them in chunks."""

from typing import Any

import pytest

from tests.distributed import own_tokens_ranks
from tests.distributed.own_tokens_ranks import CHANGES, CHUNK, CLASSES, LATE, WATCHED
from tests.support.worker_pool import Pool


def right(found: dict[str, Any]) -> bool:
    return bool(found["loss"] < 1e-6 and found["gradients"] < 1e-6 and found["hidden"])


def chunks(tokens: int, ranks: int) -> list[int]:
    """Of as many tokens of each rank, padding among them."""
    padded = -(-tokens // ranks) * ranks
    step = CHUNK // ranks * ranks
    return [min(step, padded - first) for first in range(0, padded, step)]


@pytest.mark.sample(4)
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("length", [12, 13])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_step_is_that_of_one_process(
    pool: Pool, family: str, tied: bool, length: int, ranks: int
) -> None:
    expected = chunks(4 * length, ranks)
    for found in pool.run(own_tokens_ranks.a_step, family, "", tied, length, ranks=ranks):
        assert right(found), found
        assert found["chunks"] == expected
        gathers = [("all-gather", count // ranks) for count in expected]
        scatters = [("reduce-scatter", count) for count in expected]
        own = [each for pair in zip(gathers, scatters, strict=True) for each in pair]
        assert found["moved"] == [each for each in own if each[1] > 1]


@pytest.mark.sample(2)
@pytest.mark.parametrize("change", [*CHANGES, *CLASSES])
def test_whatever_a_model_does_to_its_hidden_states_counts(pool: Pool, change: str) -> None:
    for found in pool.run(own_tokens_ranks.a_step, "llama", change):
        assert right(found), found
        assert found["chunks"] == chunks(48, 2)


def test_logits_are_formed_where_they_are_read(pool: Pool) -> None:
    for found in pool.run(own_tokens_ranks.a_step, "gemma2", "", False, 12, True):
        assert right(found), found


@pytest.mark.parametrize("what", WATCHED)
def test_a_hook_that_reads_on_one_rank_waits_for_no_other(pool: Pool, what: str) -> None:
    first, other = pool.run(own_tokens_ranks.watched_on_one_rank, what)
    assert max(first["gradients"], other["gradients"]) < 1e-6
    assert (first["seen"], other["seen"]) == (2 if what == "all outputs" else 1, 0)


def test_the_gradient_of_hidden_states_can_be_kept(pool: Pool) -> None:
    assert max(pool.run(own_tokens_ranks.gradient_is_retained)) < 1e-6


def test_an_index_too_many_is_the_error_of_torch(pool: Pool) -> None:
    for expected, said in pool.run(own_tokens_ranks.an_index_too_many):
        assert said == expected and said.startswith("IndexError: too many indices")


@pytest.mark.parametrize("how", LATE)
def test_a_gradient_of_hidden_states_that_is_not_formed_is_refused(pool: Pool, how: str) -> None:
    for message in pool.run(own_tokens_ranks.gradient_is_asked_late, how):
        assert "pass output_hidden_states=True" in message


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_micro_batches_accumulate_in_the_engine(pool: Pool, zero: int) -> None:
    for found in pool.run(own_tokens_ranks.in_the_engine, zero, ranks=4, timeout=110):
        assert found["worst"] < 1e-5, found
        assert found["chunk"] == 26 - 2 * CHUNK


@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_16_bits_round_as_much_as_with_all_tokens(pool: Pool, kind: str) -> None:
    for found in pool.run(own_tokens_ranks.rounded, kind):
        assert found["sharded"] < 1.1 * found["full"], found
