# SPDX-License-Identifier: Apache-2.0
"""Shards moved through a stand-in of NCCL, run on every rank by tests.test_nccl."""

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp.group import TPGroup
from deepspeed_autotp.nccl import Communicator

# By rank; one rank has nothing. A piece of the tests is shorter than the longest.
_LENGTHS = (5, 0, 3001, 64)
_DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.complex64, torch.bool)


def _group(seconds: float = 20.0) -> TPGroup:
    """All ranks, with a time limit."""
    handle = dist.new_group(timeout=timedelta(seconds=seconds))
    assert isinstance(handle, dist.ProcessGroup)
    dist.barrier()  # a rank that is done early takes the group from one that is still connecting
    return TPGroup(handle)


def _drawn(rank: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(rank)
    return torch.randint(0, 200, (_LENGTHS[rank],), generator=draw).to(dtype)


def unequal(piece: int) -> list[str]:
    """What did not arrive as it was sent: dtypes and roots, there and back."""
    group = _group()
    communicator = Communicator(group, piece=piece)
    wrong = []
    for root in range(group.size):
        for dtype in _DTYPES:
            sent = [_drawn(rank, dtype) for rank in range(group.size)]
            own = torch.zeros_like(sent[group.rank])
            back = [torch.zeros_like(part) for part in sent]
            is_root = group.rank == root
            communicator.scatter(sent if is_root else None, own, root=root)
            communicator.gather(own, back if is_root else None, root=root)
            if not torch.equal(own, sent[group.rank]):
                wrong.append(f"scatter of {dtype} from {root}")
            if is_root and not all(map(torch.equal, back, sent)):
                wrong.append(f"gather of {dtype} to {root}")
    communicator.close()
    return wrong


def after_close() -> list[str]:
    """The errors of calls after the communicator was closed."""
    group = _group()
    communicator = Communicator(group)
    _scatter_ones(communicator)
    communicator.close()
    communicator.close()
    return [_failure(communicator)[0] for _ in range(2)]


def left_behind(folder: str) -> list[str]:
    """What the stand-in notes of how a communicator ended that nobody closed."""
    group = _group()
    communicator = Communicator(group)
    _scatter_ones(communicator)
    del communicator
    dist.barrier(group.handle)
    return sorted(path.name for path in Path(folder).glob("*/*") if path.name[0] in "ac")


def failures(fault_rank: int, seconds: float) -> list[tuple[str, float]]:
    """Error and seconds of a scatter, and of one that follows."""
    os.environ["FAKE_NCCL_RANK"] = str(fault_rank)
    communicator = Communicator(_group(seconds))
    return [_failure(communicator), _failure(communicator)]


def without_a_peer() -> list[tuple[str, float]]:
    """The same where the last rank makes the communicator and then never comes."""
    group = _group(1.0)
    communicator = Communicator(group)
    _scatter_ones(communicator)
    if group.rank == group.size - 1:
        return []
    return [_failure(communicator), _failure(communicator)]


def refusals() -> list[str]:
    """Arguments that cannot be, each refused before anything is sent."""
    group = _group()
    communicator = Communicator(group)
    four, parts = torch.zeros(4), [torch.zeros(4)] * group.size
    root = group.rank
    calls = (
        lambda: communicator.scatter(None, four, root=root),
        lambda: communicator.scatter(parts[:1], four, root=root),
        lambda: communicator.scatter(parts, four.double(), root=root),
        lambda: communicator.gather(four, [*parts[:-1], torch.zeros(2, 2).t()], root=root),
        lambda: communicator.gather(four, parts, root=7),
    )
    found = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    return found


def _scatter_ones(communicator: Communicator) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = torch.zeros(1000)
    communicator.scatter([torch.ones(1000)] * ranks if rank == 0 else None, own)
    assert own.sum() == 1000


def _failure(communicator: Communicator) -> tuple[str, float]:
    began = time.monotonic()
    try:
        _scatter_ones(communicator)
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    return "", time.monotonic() - began
