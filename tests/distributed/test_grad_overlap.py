# SPDX-License-Identifier: Apache-2.0
"""Layers that are given one tensor share the sum of its gradient, and others do not."""

import pytest

from tests.distributed import grad_overlap_ranks
from tests.support.worker_pool import Pool


@pytest.mark.parametrize(
    ("how", "sums"),
    [
        ("same", 1),
        ("cross", 2),
        ("equal", 3),
        ("twice", 2),  # after three calls nobody is awaited any more
        ("unused", 1),
        ("between", 1),
    ],
)
@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "in turn"])
def test_one_sum_for_each_tensor_that_enters(
    pool: Pool, how: str, sums: int, overlap: bool
) -> None:
    for far, count in pool.run(grad_overlap_ranks.of_case, how, overlap):
        assert far < 1e-12
        assert count == sums


def test_passes_that_end_in_between_leave_nothing_behind(pool: Pool) -> None:
    for found in pool.run(grad_overlap_ranks.partial_passes):
        assert {name: far for name, far in found.items() if far > 1e-12} == {}


def test_frozen_layers_share_the_sum_without_a_gradient_of_their_own(pool: Pool) -> None:
    for far, trained in pool.run(grad_overlap_ranks.frozen):
        assert far < 1e-12
        assert trained == ["v.weight", "v.bias", "out.weight", "out.bias"]


@pytest.mark.parametrize("how", ["same", "cross", "checkpointed"])
def test_no_input_lives_longer_than_autograd_needs_it(pool: Pool, how: str) -> None:
    for found in pool.run(grad_overlap_ranks.kept, how):
        assert not any(found.values()), found


def test_a_hook_on_an_unused_layer_sees_no_gradient(pool: Pool) -> None:
    for found in pool.run(grad_overlap_ranks.unused_with_shared_heads):
        assert found == {"q": True, "k": True, "v": False}


def test_layers_of_one_input_make_no_cycle(pool: Pool) -> None:
    assert pool.run(grad_overlap_ranks.freed_at_once) == [True, True]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_layer_that_is_never_called_stays_as_it_is(pool: Pool, zero: int) -> None:
    for right in pool.run(grad_overlap_ranks.unused_in_engine, zero):
        assert all(right)
