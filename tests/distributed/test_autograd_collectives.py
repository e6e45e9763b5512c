# SPDX-License-Identifier: Apache-2.0
"""The autograd functions over a group are dual pairs, and groups carry whatever a model has."""

import pytest

from tests.distributed import autograd_collectives_ranks
from tests.support.worker_pool import Pool

RANKS = pytest.mark.parametrize("ranks", [2, 3, pytest.param(4, marks=pytest.mark.long)])


@RANKS
def test_values_and_gradients_are_those_of_the_full_tensors(pool: Pool, ranks: int) -> None:
    for found in pool.run(autograd_collectives_ranks.duals, ranks=ranks):
        assert len(found) == 18
        assert {name: error for name, error in found.items() if not error < 1e-14} == {}


def test_only_the_sum_works_in_place(pool: Pool) -> None:
    assert pool.run(autograd_collectives_ranks.inputs_are_kept) == [True, True]


def test_every_floating_type_keeps_its_type(pool: Pool) -> None:
    for found in pool.run(autograd_collectives_ranks.types, ranks=3):
        assert all(found.values()), found


def test_a_group_carries_every_type_and_shape(pool: Pool) -> None:
    for found in pool.run(autograd_collectives_ranks.moved, ranks=3):
        assert all(found.values()), found


@pytest.mark.parametrize(
    ("blocks", "sums"),
    [
        (((0, 2), (0, 2), (2, 1)), [3, 3, 4]),
        (((0, 1), (1, 2), (1, 2)), [1, 6, 6]),
        (((0, 3), (0, 3), (0, 3)), [7, 7, 7]),
        (((0, 2), (0, 2), (2, 2), (2, 2)), [3, 3, 12, 12]),
        (((0, 1), (1, 2), (1, 2), (3, 1)), [1, 6, 6, 8]),
    ],
)
def test_blocks_sum_apart_and_leave_later_groups_findable(
    pool: Pool, blocks: tuple[tuple[int, int], ...], sums: list[int]
) -> None:
    ranks = len(blocks)
    found = pool.run(autograd_collectives_ranks.in_blocks, blocks, ranks=ranks, timeout=30)
    assert found == [([total, total], ranks) for total in sums]


def test_every_collective_is_announced(pool: Pool) -> None:
    assert pool.run(autograd_collectives_ranks.announced) == [2, 2]
