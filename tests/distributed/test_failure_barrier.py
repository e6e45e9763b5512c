# SPDX-License-Identifier: Apache-2.0
"""Ranks behind a failure barrier leave together, whichever of them fails and wherever."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.distributed.failure_barrier import (
    CollectiveMismatch,
    PeerFailed,
    PeerLost,
    failure_barrier,
)
from deepspeed_autotp.distributed.process_group import TPGroup
from tests.support.raised_error import raised_error
from tests.support.worker_pool import Pool


def outcome(collectives: list[int], failing: int) -> str:
    """What this rank meets after its number of collectives; ``failing`` raises after them."""
    assert dist.group.WORLD is not None
    group = TPGroup(dist.group.WORLD)
    try:
        with failure_barrier(group):
            for _ in range(collectives[group.rank]):
                group.all_reduce(torch.ones(()))
            if group.rank == failing:
                raise ValueError("unwell")
    except (PeerFailed, CollectiveMismatch, ValueError) as error:
        return type(error).__name__
    return "well"


def first_call(agreement: Agreement) -> None:
    agreement.exchange("first")


def second_call(agreement: Agreement) -> None:
    agreement.together(lambda: "second")


def other_agreement() -> str:
    """What each rank is told where the second one has made a call more than the first."""
    assert dist.group.WORLD is not None
    agreement = Agreement(dist.group.WORLD)
    first_call(agreement)
    return raised_error(lambda: (first_call, second_call)[dist.get_rank()](agreement))


def absent() -> str:
    """What each rank is told where the second one comes too late to its second collective."""
    handle = dist.new_group(timeout=timedelta(seconds=1))
    assert isinstance(handle, dist.ProcessGroup)
    group = TPGroup(handle)
    try:
        with failure_barrier(group):
            group.announce("the first weight")
            time.sleep(3 * group.rank)
            group.announce("the second weight")
    except PeerLost as error:
        return "PeerLost" if group.rank else str(error)
    return "nothing"


def test_a_rank_that_does_not_come_is_told_with_the_collective(pool: Pool) -> None:
    first, second = pool.run(absent)
    assert first.startswith("one of the ranks [0, 1] did not reach the second weight; it has ")
    assert second == "PeerLost"


def test_ranks_that_do_the_same_end_well(pool: Pool) -> None:
    assert pool.run(outcome, [2, 2, 2], -1, ranks=3) == ["well"] * 3


def test_a_failing_rank_frees_its_peers(pool: Pool) -> None:
    assert pool.run(outcome, [3, 1, 3], 1, ranks=3) == ["PeerFailed", "ValueError", "PeerFailed"]


def test_ranks_at_different_collectives_all_stray(pool: Pool) -> None:
    assert pool.run(outcome, [2, 3], -1) == ["CollectiveMismatch"] * 2


def test_ranks_that_agree_on_different_things_are_told_so(pool: Pool) -> None:
    first, second = pool.run(other_agreement)
    assert first == second
    assert first.startswith("CollectiveMismatch: collective mismatch: the ranks agree on different")
    assert "rank 0 in tests.distributed.test_failure_barrier.first_call, rank 1 in " in first
    assert "first_call, rank 1 in tests.distributed.test_failure_barrier.second_call; " in first
