# SPDX-License-Identifier: Apache-2.0
"""Shards to and from rank 0."""

from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import deepspeed_autotp
from deepspeed_autotp.checkpoint.full_state import rank0_state_dict
from deepspeed_autotp.distributed import transport
from deepspeed_autotp.distributed.failure_barrier import (
    CollectiveMismatch,
    PeerFailed,
    failure_barrier,
)
from tests.support.column_shards import world_group
from tests.support.peak_memory import PeakMemory
from tests.support.shard_sizes import sizes_like
from tests.support.small_models import build

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64)


def _part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(rank)
    return torch.randint(0, 100, shape, generator=draw).to(dtype)


def _shapes(unit: int) -> list[tuple[int, ...]]:
    """Unequal ones, of which the second is empty and the last has no dimension but its size."""
    shapes = [(rank + 1, unit) for rank in range(dist.get_world_size())]
    drawn = [shapes[0], (0, unit), *((rows * unit,) for rows, _ in shapes[2:])]
    return drawn[: len(shapes)]


CPU = torch.device("cpu")


class Elsewhere(transport.ProcessGroupTransport):
    """As if the tensors were on a device that the backend does not reach."""

    def _is_reachable(self, data: Tensor) -> bool:
        return False

    def _buffers(self, tensors: Mapping[int, Tensor]) -> Any:
        buffers = super()._buffers(tensors)
        held = [buffer.staging.nbytes for buffer in buffers if buffer.staging is not None]
        assert len(held) == len(buffers) and all(size <= self._chunk for size in held)
        # What goes to all is held once.
        assert len(buffers) == len({id(tensor) for tensor in tensors.values()})
        return buffers


def scatter_and_gather(unit: int, chunk: int, small: int, here: bool) -> int:
    """Shards scattered and gathered again, checked bit by bit; how often a step was announced."""
    group, steps = world_group(), 0
    group.share_memory()
    moving = (transport.ProcessGroupTransport if here else Elsewhere)(group, CPU, chunk=chunk)

    def before(what: str) -> None:
        nonlocal steps
        steps += 1

    group.before_collective = before
    for dtype in DTYPES:
        shapes = _shapes(unit)
        parts = [_part(rank, shape, dtype) for rank, shape in enumerate(shapes)]
        into = torch.empty(shapes[group.rank], dtype=dtype)
        first, sizes = group.rank == 0, sizes_like(parts)
        moving.scatter(parts if first else None, into, sizes)
        assert torch.equal(into, parts[group.rank])
        back, everywhere = ([torch.empty_like(part) for part in parts] for _ in range(2))
        with mock.patch.object(transport, "_SMALL", small):
            moving.gather(into, back if first else None, sizes)
            moving.all_gather(into, everywhere, sizes)
        assert not first or all(map(torch.equal, back, parts))
        assert all(map(torch.equal, everywhere, parts))
    return steps


def a_transposed_shard() -> bool:
    """The shards on rank 0 need not be contiguous."""
    group = world_group()
    full = torch.arange(12.0).view(3, 4).t()
    into = torch.empty(2, 3)
    parts = list(full.chunk(2))
    given = parts if group.rank == 0 else None
    transport.ProcessGroupTransport(group, CPU).scatter(given, into, sizes_like(parts))
    return torch.equal(into, full.chunk(2)[group.rank])


def other_size() -> str:
    """The shard of rank 1 is not what both ranks know it to be."""
    group = world_group()
    sizes, part = sizes_like([torch.zeros(2), torch.zeros(3)]), torch.zeros(2)
    into = [torch.zeros(2), torch.zeros(3)] if group.rank == 0 else None
    try:
        with failure_barrier(group):
            transport.ProcessGroupTransport(group, CPU).gather(part, into, sizes)
    except (ValueError, PeerFailed) as error:
        return str(error)
    return "nothing was raised"


def other_weights() -> str:
    """The ranks gather weights of one size that are not the same."""
    group = world_group()
    parts, name = [torch.zeros(2), torch.zeros(2)], f"weight {group.rank}"
    try:
        with failure_barrier(group):
            sizes = transport.ShardSizes(name, sizes_like(parts).nbytes)
            transport.ProcessGroupTransport(group, CPU).all_gather(parts[0], parts, sizes)
    except CollectiveMismatch as error:
        return str(error)
    return "nothing was raised"


def one_fails(rank: int) -> str:
    """Rank ``rank`` fails between two shards."""
    group = world_group()
    sizes = sizes_like([torch.empty(4)] * group.size)
    try:
        with failure_barrier(group):
            for number in range(3):
                if number == 1 and group.rank == rank:
                    raise OSError("no more")
                parts = [torch.ones(4)] * group.size if group.rank == 0 else None
                transport.ProcessGroupTransport(group, CPU).scatter(parts, torch.empty(4), sizes)
    except PeerFailed:
        return "another rank failed"
    except OSError as error:
        return str(error)
    return "nothing was raised"


def no_memory(rank: int) -> str:
    """Rank ``rank`` has no memory for what is on its way."""
    group = world_group()
    make = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        if group.rank == rank:
            raise MemoryError("no more")
        return make(*args, **kwargs)

    parts = [torch.ones(4)] * group.size if group.rank == 0 else None
    into = torch.zeros(4)
    try:
        with failure_barrier(group), mock.patch.object(torch, "empty", empty):
            Elsewhere(group, CPU).scatter(parts, into, sizes_like([into] * group.size))
    except PeerFailed:
        return "another rank failed"
    except MemoryError as error:
        return str(error)
    return "nothing was raised"


def saving_fails(failing: int) -> str:
    """Rank ``failing`` fails at the third weight that is gathered."""
    model = build("llama", tied=False)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    gather, done = transport.Transport.gather, []

    def failing_gather(through: transport.Transport, part: Tensor, *rest: Any) -> None:
        done.append(part)
        if dist.get_rank() == failing and len(done) == 3:
            raise MemoryError("no more")
        gather(through, part, *rest)

    with mock.patch.object(transport.Transport, "gather", failing_gather):
        try:
            rank0_state_dict(model, frozen=True)
        except PeerFailed as error:
            assert "gathering the weights failed on another rank" in str(error)
            return "another rank failed"
        except MemoryError as error:
            return str(error)
    return "nothing was raised"


def peak_of_saving(tp: int) -> tuple[int, int, int]:
    """Most bytes that were made in saving, of everywhere and of rank 0; and a weight's."""
    model = build("llama", tied=False)
    deepspeed_autotp.parallelize(model, tp_size=tp)
    with PeakMemory() as everywhere:
        full = deepspeed_autotp.full_state_dict(model)
    with mock.patch.object(transport, "_SMALL", 0), PeakMemory() as first:
        state = rank0_state_dict(model, frozen=True)
    assert (state is None) == (dist.get_rank() > 0)
    if state is not None:
        assert state.keys() == full.keys()
        assert all(torch.equal(state[name], weight) for name, weight in full.items())
    return everywhere.most, first.most, min(w.nbytes for w in full.values() if w.dim() == 2)
