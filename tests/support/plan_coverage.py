# SPDX-License-Identifier: Apache-2.0
"""That the shards of a parameter are all of it."""

import torch

from deepspeed_autotp._core import Entry, Plan


def check_plan(plan: Plan) -> None:
    for entry in plan.entries:
        if entry.is_sharded:
            check_covered(entry, plan.ranks)


def check_covered(entry: Entry, ranks: int) -> None:
    """Each element along the sharded dimension is on some rank and on none of them twice, and the
    lowest rank that has it owns it."""
    held = [_elements(entry, rank) for rank in range(ranks)]
    holders = torch.zeros(entry.view[1], dtype=torch.int64)
    owner = torch.zeros_like(holders)
    for rank in reversed(range(ranks)):
        assert len(held[rank]) == len(held[rank].unique()) == entry.width(rank), entry.name
        holders[held[rank]] += 1
        owner[held[rank]] = rank
    assert bool((holders > 0).all()), entry.name
    for rank in range(ranks):
        told = torch.ones_like(held[rank])
        for offset, length, first, count in entry.shared(rank):
            run = held[rank][offset : offset + length]
            told[offset : offset + length] = count
            assert count > 1 and bool((owner[run] == first).all()), entry.name
        assert torch.equal(holders[held[rank]], told), entry.name


def _elements(entry: Entry, rank: int) -> torch.Tensor:
    """Those that a rank has, in the order of its shard."""
    runs = entry.runs(rank)
    pairs = zip(runs[::2], runs[1::2], strict=True)
    found = [torch.arange(start, start + length) for start, length in pairs]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
