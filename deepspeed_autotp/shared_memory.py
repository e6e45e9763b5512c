# SPDX-License-Identifier: Apache-2.0
"""Sums and gathers of host tensors between ranks of one host, in memory that they share.

A process group of gloo moves every byte through a socket, and wakes two threads for it: a sum of
256 KB over two ranks takes a millisecond. Laid out in shared memory it takes as long as two
copies. The memory belongs to a process group, whose ranks use it in place of sockets where all
of them can open it. ``AUTOTP_SHARED_MEMORY=0`` leaves everything to the group.
"""

from __future__ import annotations

import os
import secrets
import weakref
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp import native

# Bytes of one of a rank's two slots; a longer message goes in pieces. Larger ones gain nothing, and
# containers often have no more than 64 MB of shared memory.
_SLOT = 1 << 20
_SUMMED = frozenset({torch.float32, torch.float64, torch.bfloat16})
_HOST = torch.device("cpu")

_ops = native.loaded()


class Started(Protocol):
    """A collective that is on its way."""

    def wait(self) -> object: ...


class SharedMemory:
    """The memory that the ranks of one process group share. All of them make every call.

    A message whose result was not waited for keeps others away: ``is_free`` says so. Everywhere
    RuntimeError where a rank has ended, or does not come within the time limit of the group.
    """

    def __init__(self, number: int, seconds: float) -> None:
        self._number = number
        self._seconds = seconds
        self.is_free = True
        weakref.finalize(self, _ops.shm_close, number)

    def sums(self, x: Tensor) -> bool:
        """Whether tensors like ``x`` can be summed now."""
        return self.gathers(x) and x.dtype in _SUMMED

    def gathers(self, x: Tensor) -> bool:
        """Whether tensors like ``x`` can be gathered now."""
        return self.is_free and x.device.type == "cpu"

    def start_sum(self, x: Tensor, *, into: Tensor, first: int = 0) -> Started:
        """Hand contiguous ``x`` over. When it is waited for, as many items of the sum over the
        ranks as ``into`` has, from item ``first`` on, are put there; it may be ``x``."""
        x = x.detach()
        _ops.shm_post(self._number, x, self._seconds)
        self.is_free = False
        return _Sum(self, x, into.detach(), first)

    def gather(self, x: Tensor, *, into: Tensor) -> None:
        """Put the tensors of all ranks, each as large as contiguous ``x``, one after the other."""
        x = x.detach()
        _ops.shm_post(self._number, x, self._seconds)
        _ops.shm_take_all(self._number, x, into.detach(), self._seconds)

    def take(self, x: Tensor, into: Tensor, first: int) -> None:
        """Wait for a sum that was started."""
        self.is_free = True
        _ops.shm_take_sum(self._number, x, into, first, self._seconds)


@dataclass(frozen=True, slots=True)
class _Sum:
    """A sum that was started."""

    memory: SharedMemory
    x: Tensor
    into: Tensor
    first: int

    def wait(self) -> None:
        self.memory.take(self.x, self.into, self.first)


# Of each group that has asked; None where it uses sockets.
_known: weakref.WeakKeyDictionary[dist.ProcessGroup, SharedMemory | None] = (
    weakref.WeakKeyDictionary()
)


def shared_memory(handle: dist.ProcessGroup) -> SharedMemory | None:
    """The memory of a group, or None where some rank cannot open it. All its ranks call it.

    None also for a group of one rank, and for one that has another transport than gloo's.
    """
    if handle not in _known:
        _known[handle] = _opened(handle)
    return _known[handle]


def _opened(handle: dist.ProcessGroup) -> SharedMemory | None:
    seconds = _time_limit(handle)
    if seconds is None or handle.size() == 1:
        return None
    # No number of a process: those of two containers can be the same.
    token = torch.tensor(secrets.randbits(62))
    dist.broadcast(token, dist.get_global_rank(handle, 0), group=handle)
    name = f"/autotp-{int(token):016x}"
    # The first rank makes it, before the others look for it.
    number = _open(name, handle) if handle.rank() == 0 else None
    dist.barrier(handle)
    if handle.rank() > 0:
        number = _open(name, handle)
    everyone = torch.tensor(number is not None, dtype=torch.int32)
    dist.all_reduce(everyone, dist.ReduceOp.MIN, group=handle)
    if handle.rank() == 0:
        _ops.shm_unlink(name)
    if number is None:
        return None
    memory = SharedMemory(number, seconds)
    return memory if everyone else None


def _open(name: str, handle: dist.ProcessGroup) -> int | None:
    """The number of the memory, or None where it cannot be had or is not wanted."""
    if os.environ.get("AUTOTP_SHARED_MEMORY") == "0":
        return None
    try:
        number: int = _ops.shm_open(name, handle.rank(), handle.size(), _SLOT)
    except RuntimeError:  # another host, no /dev/shm, or one that is full
        return None
    return number


def _time_limit(handle: dist.ProcessGroup) -> float | None:
    """Seconds that a collective on host tensors may take; None where gloo does not carry them."""
    if _HOST not in handle._device_types:
        return None
    backend = handle._get_backend(_HOST)
    if not isinstance(backend, dist.ProcessGroupGloo):
        return None
    seconds: float = backend.options._timeout.total_seconds()
    return seconds
