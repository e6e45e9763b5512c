# SPDX-License-Identifier: Apache-2.0
"""Bytes moved through a stand-in of NCCL."""

import os
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import deepspeed_autotp
from deepspeed_autotp.checkpoint.full_state import rank0_state_dict
from deepspeed_autotp.distributed import nccl
from deepspeed_autotp.distributed.failure_barrier import PeerFailed, failure_barrier
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.distributed.transport import NcclTransport, open_transport
from tests.support.log_records import LoggedMessages
from tests.support.models_on_rank0 import same_weights, weights_on_rank0
from tests.support.shard_sizes import sizes_like
from tests.support.small_models import build

HOST = torch.device("cpu")
# By rank; one rank has nothing. A chunk of the tests is shorter than the longest.
_LENGTHS = (5, 0, 3001, 64)
_DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.complex64, torch.bool)


def _group(seconds: float = 20.0) -> TPGroup:
    """All ranks, with a timeout."""
    handle = dist.new_group(timeout=timedelta(seconds=seconds))
    assert isinstance(handle, dist.ProcessGroup)
    dist.barrier()  # a rank that is done early ends the group of one that is still connecting
    return TPGroup(handle)


def _connected(group: TPGroup) -> nccl.Communicator:
    communicator = nccl.connect(group, HOST)
    assert communicator is not None
    return communicator


def _drawn(rank: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(rank)
    return torch.randint(0, 200, (_LENGTHS[rank],), generator=draw).to(dtype)


def unequal(chunk: int) -> list[str]:
    """What did not arrive as it was sent, there and back."""
    group = _group()
    communicator = _connected(group)
    parts = NcclTransport(group, communicator, chunk=chunk)
    first = group.rank == 0
    wrong = []
    for dtype in _DTYPES:
        sent = [_drawn(rank, dtype) for rank in range(group.size)]
        own = torch.zeros_like(sent[group.rank])
        back, everywhere = ([torch.zeros_like(part) for part in sent] for _ in range(2))
        sizes = sizes_like(sent)
        parts.scatter(sent if first else None, own, sizes)
        parts.gather(own, back if first else None, sizes)
        parts.all_gather(own, everywhere, sizes)
        if not torch.equal(own, sent[group.rank]):
            wrong.append(f"scatter of {dtype}")
        if first and not all(map(torch.equal, back, sent)):
            wrong.append(f"gather of {dtype}")
        if not all(map(torch.equal, everywhere, sent)):
            wrong.append(f"gather of {dtype} to all")
    communicator.close()
    return wrong


def after_close() -> list[str]:
    """The errors of calls after the communicator was closed."""
    communicator = _connected(_group())
    _hand_ones(communicator)
    communicator.close()
    communicator.close()
    return [_failure(communicator)[0] for _ in range(2)]


def ended(folder: str) -> list[str]:
    """What the stand-in records of how the communicators ended."""
    group = _group()
    with open_transport(group, HOST) as parts:
        assert isinstance(parts, NcclTransport)
    dist.barrier(group.handle)
    return sorted(path.name for path in Path(folder).glob("*/*") if path.name[0] in "ac")


def failures(fault_rank: int, seconds: float) -> list[tuple[str, float]]:
    """Error and seconds of an exchange, and of one that follows."""
    os.environ["FAKE_NCCL_RANK"] = str(fault_rank)
    communicator = _connected(_group(seconds))
    return [_failure(communicator), _failure(communicator)]


def without_a_peer() -> list[tuple[str, float]]:
    """The same where the last rank makes the communicator and then never comes."""
    group = _group(1.0)
    communicator = _connected(group)
    _hand_ones(communicator)
    if group.rank == group.size - 1:
        return []
    return [_failure(communicator), _failure(communicator)]


def carried_to_failure(fault_rank: int, seconds: float) -> tuple[str, float]:
    """The error of a scatter whose ranks are in failure_barrier, and when it came."""
    os.environ["FAKE_NCCL_RANK"] = str(fault_rank)
    group, own = _group(seconds), torch.zeros(3)
    ones = [torch.ones(3)] * group.size
    began, said = time.monotonic(), "nothing"
    try:
        with failure_barrier(group), open_transport(group, HOST) as parts:
            parts.scatter(ones if group.rank == 0 else None, own, sizes_like(ones))
    except PeerFailed:
        said = "PeerFailed"
    except RuntimeError as error:
        said = str(error)
    return said, time.monotonic() - began


def carried_anyway(fault_rank: int, seconds: float) -> tuple[str, list[str]]:
    """What moves the shards in place of NCCL, and the warnings."""
    os.environ["FAKE_NCCL_RANK"] = str(fault_rank)
    return _carried(_group(seconds))


def other_version() -> tuple[str, list[str]]:
    """The same where the last rank has another NCCL."""
    group = _group()
    if group.rank == group.size - 1:
        os.environ["FAKE_NCCL_VERSION"] = "22800"
    return _carried(group)


def one_gpu() -> tuple[str, list[str]]:
    """The same where two ranks have one GPU."""
    with mock.patch.object(nccl, "_device_id", return_value=7):
        return _carried(_group())


def _carried(group: TPGroup) -> tuple[str, list[str]]:
    own = torch.zeros(3)
    with LoggedMessages() as said, open_transport(group, HOST) as parts:
        ones = [torch.ones(3)] * group.size
        parts.scatter(ones if group.rank == 0 else None, own, sizes_like(ones))
    assert own.sum() == 3
    return type(parts).__name__, said


def scatter_save_and_gather(folder: str) -> tuple[list[bool], list[str]]:
    """A model of rank 0 is scattered, saved by it and gathered by all."""
    unsharded = build("llama", tied=False)
    with weights_on_rank0(dist.get_world_size()):
        model = build("llama", tied=False)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    first = rank0_state_dict(model, frozen=True)
    assert (first is None) == (dist.get_rank() > 0)
    state = unsharded.state_dict()
    same = [same_weights(model, unsharded)]
    if first is not None:
        same += [torch.equal(first[name], weight) for name, weight in state.items()]
    dist.barrier()
    return same, sorted(path.name for path in Path(folder).glob("*/closed-*"))


def _hand_ones(communicator: nccl.Communicator) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = torch.zeros(1000)
    if rank == 0:
        ones = torch.ones(1000)
        communicator.exchange("scatter", dict.fromkeys(range(1, ranks), ones), {})
    else:
        communicator.exchange("scatter", {}, {0: own})
        assert own.sum() == 1000


def _failure(communicator: nccl.Communicator) -> tuple[str, float]:
    began = time.monotonic()
    try:
        _hand_ones(communicator)
    except (RuntimeError, ValueError) as error:
        return str(error), time.monotonic() - began
    return "", time.monotonic() - began
