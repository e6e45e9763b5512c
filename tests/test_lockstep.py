# SPDX-License-Identifier: Apache-2.0
"""Ranks in lockstep leave together, whichever of them fails and wherever."""

import torch
import torch.distributed as dist

from deepspeed_autotp.group import TPGroup
from deepspeed_autotp.lockstep import PeerFailed, Strayed, lockstep
from tests.pool import Pool


def outcome(collectives: list[int], failing: int) -> str:
    """What this rank meets after its number of collectives; ``failing`` raises after them."""
    assert dist.group.WORLD is not None
    group = TPGroup(dist.group.WORLD)
    try:
        with lockstep(group):
            for _ in range(collectives[group.rank]):
                group.all_reduce(torch.ones(()))
            if group.rank == failing:
                raise ValueError("unwell")
    except (PeerFailed, Strayed, ValueError) as error:
        return type(error).__name__
    return "well"


def test_ranks_that_do_the_same_end_well(pool: Pool) -> None:
    assert pool.run(outcome, [2, 2, 2], -1, ranks=3) == ["well"] * 3


def test_a_failing_rank_frees_its_peers(pool: Pool) -> None:
    assert pool.run(outcome, [3, 1, 3], 1, ranks=3) == ["PeerFailed", "ValueError", "PeerFailed"]


def test_ranks_at_different_collectives_all_stray(pool: Pool) -> None:
    assert pool.run(outcome, [2, 3], -1) == ["Strayed"] * 2
