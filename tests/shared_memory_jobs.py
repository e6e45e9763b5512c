# SPDX-License-Identifier: Apache-2.0
"""Collectives in memory that ranks share, run on every rank by tests.test_shared_memory."""

import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import deepspeed_autotp
from benchmarks.step_calls import Recorder
from deepspeed_autotp.group import TPGroup
from deepspeed_autotp.shared_memory import shared_memory
from tests.families import build, tokens
from tests.parts import even, world

# Of a message: nothing, less than a slot, and more than the two slots.
_LENGTHS = (0, 1, 1000, 700_001)


def _drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(shape, generator=draw, dtype=torch.float64).mul_(10).to(dtype)


def _results(group: TPGroup, length: int, dtype: torch.dtype, held: torch.dtype) -> list[Tensor]:
    """An all-reduce, an all-gather of unequal parts, one of rows, and a reduce-scatter."""

    def drawn(*shape: int) -> Tensor:
        return _drawn(shape, dtype).to(held)

    rank, widths = group.rank, even(length)
    shapes = [(width, 2) for width in widths]
    summed = group.all_reduce(drawn(length))
    parts = group.all_gather(drawn(*shapes[rank]), shapes)
    rows = group.all_gather_rows(drawn(*shapes[rank]), widths)
    started, own = group.start_reduce_scatter(drawn(length, 2), widths)
    started.wait()
    return [summed, *parts, rows, own]


def against_sockets(dtype: torch.dtype) -> float:
    """The largest difference to what gloo gives, floats in float64; gathers have none."""
    through, within = world(), world()
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
    model(input_ids=ids, labels=ids)  # the first call compares the batches of the ranks
    with Recorder() as recorder:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    gradient = model.get_parameter("model.norm.weight").grad
    assert gradient is not None
    own = torch.cat([loss.detach().reshape(1), gradient])
    all_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, own)
    same = all(torch.equal(other, own) for other in all_ranks)
    left = any(Path("/dev/shm").glob("autotp-*"))
    return {call.transport for call in recorder.calls}, same, left


def carried(off_on: int) -> str:
    """What carries a sum where rank ``off_on`` does not want the memory."""
    if dist.get_rank() == off_on:
        os.environ["AUTOTP_SHARED_MEMORY"] = "0"
    group = world()
    group.share_memory()
    with Recorder() as recorder:
        total = group.all_reduce(torch.ones(3))
    assert torch.equal(total, torch.full((3,), float(group.size)))
    (call,) = recorder.calls
    return call.transport


def kinds_left_to_sockets() -> list[str]:
    """What carries a sum of integers, a second sum before the first was waited for, and a third."""
    group = world()
    group.share_memory()
    first, second = torch.ones(2), torch.ones(2)
    with Recorder() as recorder:
        group.all_reduce(torch.ones(2, dtype=torch.int64))
        one, other = group.start_all_reduce(first), group.start_all_reduce(second)
        other.wait()
        one.wait()
        group.all_reduce(first)
    assert first.tolist() == [4.0, 4.0] and second.tolist() == [2.0, 2.0]
    # A sum is seen where it is taken: the second one of gloo's before the first.
    return [call.transport for call in recorder.calls]


def mapped_after_use() -> tuple[int, int]:
    """How many shared memories this process has mapped: with a group, and once it is gone."""
    handle = dist.new_group()
    assert shared_memory(handle) is shared_memory(handle) is not None
    held = _mapped()
    dist.destroy_process_group(handle)
    del handle
    gc.collect()
    return held, _mapped()


def _mapped() -> int:
    return Path("/proc/self/maps").read_text().count("/dev/shm/autotp-")
