# SPDX-License-Identifier: Apache-2.0
"""Parts to and from the first rank, run on every rank by tests.test_transfer."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import deepspeed_autotp
from deepspeed_autotp import transfer
from deepspeed_autotp.full_state import first_rank_state_dict
from deepspeed_autotp.lockstep import PeerFailed, lockstep
from tests.families import build
from tests.parts import Peak, world

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64)


def _part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(rank)
    return torch.randint(0, 100, shape, generator=draw).to(dtype)


def _shapes(unit: int) -> list[tuple[int, ...]]:
    """Unequal ones, of which the second is empty and the last has no dimension but its size."""
    shapes = [(rank + 1, unit) for rank in range(dist.get_world_size())]
    return [shapes[0], (0, unit), *((rows * unit,) for rows, _ in shapes[2:])]


class Elsewhere(transfer.PointToPoint):
    """As if the tensors lay on a device that the backend does not reach."""

    def _carries(self, data: Tensor) -> bool:
        return False


def there_and_back(unit: int, piece: int, here: bool) -> int:
    """Parts handed out and collected again, checked bit by bit; how often a step was announced."""
    group, steps = world(), 0
    group.share_memory()
    carrier = (transfer.PointToPoint if here else Elsewhere)(group, piece=piece)

    def before() -> None:
        nonlocal steps
        steps += 1

    group.before = before
    for dtype in DTYPES:
        shapes = _shapes(unit)
        parts = [_part(rank, shape, dtype) for rank, shape in enumerate(shapes)]
        into = torch.empty(shapes[group.rank], dtype=dtype)
        first = group.rank == 0
        carrier.scatter(parts if first else None, into)
        assert torch.equal(into, parts[group.rank])
        back, everywhere = ([torch.empty_like(part) for part in parts] for _ in range(2))
        carrier.gather(into, back if first else None)
        assert not first or all(map(torch.equal, back, parts))
        carrier.gather_to_all(into, everywhere)
        assert all(map(torch.equal, everywhere, parts))
    return steps


def a_transposed_part() -> bool:
    """The first rank's parts need not be contiguous."""
    group = world()
    full = torch.arange(12.0).view(3, 4).t()
    into = torch.empty(2, 3)
    parts = list(full.chunk(2)) if group.rank == 0 else None
    transfer.PointToPoint(group).scatter(parts, into)
    return torch.equal(into, full.chunk(2)[group.rank])


def other_sizes() -> str:
    group = world()
    parts = [torch.zeros(2), torch.zeros(3)]
    try:
        transfer.PointToPoint(group).scatter(parts if group.rank == 0 else None, torch.zeros(2))
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def one_fails(rank: int) -> str:
    """Rank ``rank`` fails between two parts."""
    group = world()
    try:
        with lockstep(group):
            for number in range(3):
                if number == 1 and group.rank == rank:
                    raise OSError("no more")
                parts = [torch.ones(4)] * group.size if group.rank == 0 else None
                transfer.PointToPoint(group).scatter(parts, torch.empty(4))
    except (PeerFailed, OSError) as error:
        return str(error)
    return "nothing was raised"


def no_memory(rank: int) -> str:
    """Rank ``rank`` has no memory for what is on its way."""
    group = world()
    make = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        if group.rank == rank:
            raise MemoryError("no more")
        return make(*args, **kwargs)

    parts = [torch.ones(4)] * group.size if group.rank == 0 else None
    into = torch.zeros(4)
    try:
        with lockstep(group), mock.patch.object(torch, "empty", empty):
            Elsewhere(group).scatter(parts, into)
    except (PeerFailed, MemoryError) as error:
        return str(error)
    return "nothing was raised"


def saving_fails(failing: int) -> str:
    """Rank ``failing`` fails at the third weight that is collected."""
    model = build("llama", tied=False)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    gather, done = transfer.Carrier.gather, []

    def failing_gather(carrier: transfer.Carrier, part: Tensor, into: Any) -> None:
        done.append(part)
        if dist.get_rank() == failing and len(done) == 3:
            raise MemoryError("no more")
        gather(carrier, part, into)

    with mock.patch.object(transfer.Carrier, "gather", failing_gather):
        try:
            first_rank_state_dict(model, frozen=True)
        except (PeerFailed, MemoryError) as error:
            return str(error)
    return "nothing was raised"


def peak_of_saving(tp: int) -> tuple[int, int, int]:
    """Most bytes that were made in saving, of everywhere and of the first rank; and a weight's."""
    model = build("llama", tied=False)
    deepspeed_autotp.parallelize(model, tp_size=tp)
    with Peak() as everywhere:
        full = deepspeed_autotp.full_state_dict(model)
    with Peak() as first:
        state = first_rank_state_dict(model, frozen=True)
    assert (state is None) == (dist.get_rank() > 0)
    if state is not None:
        assert state.keys() == full.keys()
        assert all(torch.equal(state[name], weight) for name, weight in full.items())
    return everywhere.most, first.most, min(w.nbytes for w in full.values() if w.dim() == 2)
