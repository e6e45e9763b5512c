# SPDX-License-Identifier: Apache-2.0
"""Objects of all ranks on every rank, in one all-gather where they are small."""

from unittest import mock

import torch
import torch.distributed as dist

from deepspeed_autotp.distributed.object_exchange import exchange_objects
from tests.support.raised_error import raised_error
from tests.support.worker_pool import Pool

SIZES = (0, 400, 480, 495, 496, 497, 510, 520, 100_000)
# Bytes of a pickled object besides those of its text, and of what an all-gather has first.
MARGIN, FIRST = 48, 512


def exchanged(apart: bool) -> list[tuple[int, bool, int]]:
    """Of texts of some sizes: the size, whether all came as they were, and the all-gathers. With
    ``apart`` those of the ranks after the first are empty."""
    found = []
    rank, ranks = dist.get_rank(), dist.get_world_size()
    assert dist.group.WORLD is not None
    for size in SIZES:
        texts = [str(r) * size if r == 0 or not apart else None for r in range(ranks)]
        with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as calls:
            everyone = exchange_objects(texts[rank], dist.group.WORLD)
        found.append((size, everyone == texts, calls.call_count))
    return found


def beside_another_collective() -> str:
    """What rank 0 reads where rank 1 gathers a tensor of as many bytes."""
    assert dist.group.WORLD is not None
    if dist.get_rank() == 0:
        return raised_error(lambda: exchange_objects("x", dist.group.WORLD))
    sent = torch.full((FIRST,), 255, dtype=torch.uint8)
    dist.all_gather([torch.empty_like(sent) for _ in range(dist.get_world_size())], sent)
    return ""


def test_a_rank_in_another_collective_is_named(pool: Pool) -> None:
    first, _ = pool.run(beside_another_collective)
    assert first.startswith("CollectiveMismatch: collective mismatch: rank 1 is in another ")


def test_objects_of_any_size_come_as_they_were(pool: Pool) -> None:
    for apart in (False, True):
        for found in pool.run(exchanged, apart, ranks=3):
            assert [same for _, same, _ in found] == [True] * len(SIZES)
            calls = {size: count for size, _, count in found}
            assert all(calls[size] == 1 for size in SIZES if size + MARGIN <= FIRST)
            assert all(calls[size] == 2 for size in SIZES if size > FIRST)
