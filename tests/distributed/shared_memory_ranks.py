# SPDX-License-Identifier: Apache-2.0
"""Collectives in memory that ranks share."""

import gc
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import deepspeed_autotp
from benchmarks.step_calls import SHARED_MEMORY, Recorder
from deepspeed_autotp.distributed import shared_memory as shared_memory_module
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.distributed.shared_memory import shared_memory
from tests.support.column_shards import even_widths, world_group
from tests.support.open_resources import mapped_shared_memories
from tests.support.small_models import build, tokens

# Of a message: nothing, less than a slot, and more than the two slots.
_LENGTHS = (0, 1, 1000, 700_001)


def _drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(shape, generator=draw, dtype=torch.float64).mul_(10).to(dtype)


def _results(group: TPGroup, length: int, dtype: torch.dtype, held: torch.dtype) -> list[Tensor]:
    """An all-reduce, an all-gather of unequal shards, one of rows, and a reduce-scatter."""

    def drawn(*shape: int) -> Tensor:
        return _drawn(shape, dtype).to(held)

    rank, widths = group.rank, even_widths(length)
    shapes = [(width, 2) for width in widths]
    summed = group.all_reduce(drawn(length))
    parts = group.all_gather(drawn(*shapes[rank]), shapes)
    rows = group.all_gather_rows(drawn(*shapes[rank]), widths)
    started, own = group.start_reduce_scatter(drawn(length, 2), widths)
    started.wait()
    return [summed, *parts, rows, own]


def against_sockets(dtype: torch.dtype) -> float:
    """The largest difference to what gloo gives, floats in float64; gathers have none."""
    through, within = world_group(), world_group()
    within.share_memory()
    exact = torch.float64 if dtype.is_floating_point else dtype
    worst = 0.0
    for length in _LENGTHS:
        given = _results(through, length, dtype, exact)
        found = _results(within, length, dtype, dtype)
        for a, b in zip(given, found, strict=True):
            apart = (a.double() - b.double()).abs() / a.double().abs().clamp(min=1)
            worst = max(worst, float(apart.max())) if a.numel() else worst
    return worst


def of_a_step() -> tuple[set[str], bool, bool]:
    """What carries a training step, whether all ranks have the same sums, and what is left."""
    model = build("llama", tied=False)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    ids = tokens(0)
    for _ in range(2):  # in which the ranks compare their batches, and what several of them hold
        model(input_ids=ids, labels=ids)
    with Recorder() as recorder:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    gradient = model.get_parameter("model.norm.weight").grad
    assert gradient is not None
    own = torch.cat([loss.detach().reshape(1), gradient])
    all_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, own)
    same = all(torch.equal(other, own) for other in all_ranks)
    unlinked = mapped_shared_memories(" (deleted)")  # DeepSpeed may keep groups of earlier jobs
    left = mapped_shared_memories() > unlinked
    return {call.transport for call in recorder.calls}, same, left


def carried(off_on: int) -> str:
    """What carries a sum where rank ``off_on`` does not want the memory."""
    if dist.get_rank() == off_on:
        os.environ["AUTOTP_SHARED_MEMORY"] = "0"
    group = world_group()
    group.share_memory()
    with Recorder() as recorder:
        total = group.all_reduce(torch.ones(3))
    assert torch.equal(total, torch.full((3,), float(group.size)))
    (call,) = recorder.calls
    return call.transport


def kinds_left_to_sockets() -> list[str]:
    """What carries a sum of integers, and one of floats."""
    group = world_group()
    group.share_memory()
    with Recorder() as recorder:
        group.all_reduce(torch.ones(2, dtype=torch.int64))
        group.all_reduce(torch.ones(2))
    return [call.transport for call in recorder.calls]


def irregular() -> dict[str, list[float]]:
    """Sums that are waited for late, twice or never, and one that is refused."""
    group = world_group()
    group.share_memory()
    late, early, dropped, last = (torch.full((2,), float(n)) for n in (1, 2, 3, 4))
    first, second = group.start_all_reduce(late), group.start_all_reduce(early)
    second.wait()
    first.wait()
    first.wait()
    if group.rank == 0:
        group.start_all_reduce(dropped)  # as by a caller that fails before it waits
    else:
        group.all_reduce(dropped)
    refused = torch.full((3, 1), 7.0)
    try:
        group.start_reduce_scatter(refused, (4, 4))
    except ValueError:
        refused.zero_()
    group.all_reduce(last)
    tensors = {"late": late, "early": early, "dropped": dropped, "refused": refused, "last": last}
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


def unlike(what: str) -> list[str]:
    """The errors where the ranks pass unlike tensors, and of the next sum."""
    group = world_group()
    group.share_memory()
    group.all_reduce(torch.ones(4))
    said = []
    for _ in range(2):
        try:
            if what == "lengths":
                group.all_reduce(torch.ones(10 + group.rank))
            elif what == "types":
                group.all_reduce(torch.ones(4, dtype=(torch.float32, torch.float64)[group.rank]))
            elif group.rank == 0:
                group.all_reduce(torch.ones(4))
            else:
                group.all_gather(torch.ones(4), [(4,)] * group.size)
        except RuntimeError as error:
            said.append(str(error))
    return said


def recovered() -> list[float]:
    """A sum of two groups over the same ranks, after one of them has failed."""
    began = _held_before()
    one, other = world_group(), world_group()
    for group in (one, other):
        group.share_memory()
    try:
        one.all_reduce(torch.ones(10 + one.rank))
    except RuntimeError:
        one.recover()
    with Recorder() as recorder:
        sums = [float(group.all_reduce(torch.ones(()))) for group in (one, other)]
    assert {call.transport for call in recorder.calls} == {SHARED_MEMORY}
    return [*sums, float(mapped_shared_memories() - began)]


def opened_with(case: str) -> tuple[str, bool, int]:
    """What ``parallelize`` logs in a bad environment, and what is left of the memory."""
    said, began, group = "", _held_before(), world_group()
    if case == "variable":
        os.environ["AUTOTP_SHARED_MEMORY"] = "off"
    if case == "device":
        torch.set_default_device("meta")
    names: list[str] = []
    name_of, original = shared_memory_module._name, dist.all_reduce

    def noted(token: Tensor) -> str:
        names.append(name_of(token))
        return names[-1]

    shared_memory_module._name = noted
    if case == "failure":

        def failing(*args: Any, **named: Any) -> None:
            raise RuntimeError("connection lost")

        dist.all_reduce = failing
    try:
        if case == "variable":
            deepspeed_autotp.parallelize(build("llama", tied=False), tp_size=2)
        else:
            group.share_memory()
    except (RuntimeError, ValueError) as error:
        said = str(error)
    finally:
        dist.all_reduce, shared_memory_module._name = original, name_of
        torch.set_default_device(None)
    dist.barrier()
    gc.collect()
    return (
        said,
        any(Path(f"/dev/shm{name}").exists() for name in names),
        mapped_shared_memories() - began,
    )


def mapped_after_use() -> list[int]:
    """How many shared memories this process has mapped: with two users in a group; with one, on
    rank 0 only; with another one then; and once all are gone, while the group is not."""
    began = _held_before()
    handle = dist.new_group()
    first, second = shared_memory(handle), shared_memory(handle)
    assert first is second is not None
    found = [mapped_shared_memories() - began]
    del first
    if dist.get_rank() == 1:
        second = None
    found.append(mapped_shared_memories() - began)
    third = shared_memory(handle)
    found.append(mapped_shared_memories() - began)
    del second, third
    return [*found, mapped_shared_memories() - began]


def _held_before() -> int:
    """Shared memories that earlier jobs have left: DeepSpeed's globals keep groups."""
    gc.collect()
    return mapped_shared_memories()
