# SPDX-License-Identifier: Apache-2.0
"""Rank 0 scatters shards and gathers them; the others never hold more than their own."""

from typing import Any

import pytest

from tests.distributed import transport_ranks as jobs
from tests.support.worker_pool import Pool


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("chunk", "small"),
    [(7, 0), (1 << 20, 0), (1 << 20, 1 << 16)],
    ids=["many chunks", "one chunk", "small"],
)
@pytest.mark.parametrize("here", [True, False], ids=["here", "on another device"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shards_are_scattered_and_gathered_bit_by_bit(
    pool: Pool, ranks: int, here: bool, chunk: int, small: int
) -> None:
    steps = pool.run(jobs.scatter_and_gather, 13, chunk, small, here, ranks=ranks)
    assert len(set(steps)) == 1, "ranks that step unequally often would wait for each other"
    assert steps[0] >= 3 * len(jobs.DTYPES), "three ways for each type"
    assert (steps[0] > 3 * len(jobs.DTYPES)) == (chunk == 7)


def test_shards_that_are_not_contiguous_are_scattered_as_they_read(pool: Pool) -> None:
    assert pool.run(jobs.a_transposed_shard) == [True, True]


def test_a_shard_of_another_size_is_named_and_ends_the_others(pool: Pool) -> None:
    first, second = pool.run(jobs.other_size)
    assert first == "another rank failed"
    assert second.startswith(
        "a weight: the shard of rank 1 of 2 has 8 bytes (torch.float32), expec"
    )


def test_ranks_that_move_different_weights_of_one_size_are_told(pool: Pool) -> None:
    for rank, text in enumerate(pool.run(jobs.other_weights)):
        assert (
            text.startswith("mismatch between collectives on the ranks: ") and "same order" in text
        )
        assert f"rank {rank} is at all-gather of weight {rank}, [8, 8] bytes" in text


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("job", [jobs.one_fails, jobs.no_memory, jobs.saving_fails])
def test_a_rank_that_fails_on_the_way_ends_the_others(pool: Pool, job: Any, failing: int) -> None:
    said = pool.run(job, failing, ranks=3, timeout=20.0)
    expected = ["another rank failed"] * 3
    expected[failing] = "no more"
    assert said == expected


@pytest.mark.parametrize("tp", [2, 4])
def test_saving_makes_no_full_weight_but_on_rank_0(pool: Pool, tp: int) -> None:
    found = pool.run(jobs.peak_of_saving, tp, ranks=4)
    for rank, (everywhere, first, smallest) in enumerate(found):
        assert everywhere > smallest
        assert (first >= smallest) == (rank == 0)
