# SPDX-License-Identifier: Apache-2.0
"""Sums and gathers of host tensors between ranks of one host, in memory that they share.

A process group of gloo moves every byte through a socket, and wakes two threads for it: a sum of
256 KB over two ranks takes a millisecond. Laid out in shared memory it takes as long as two
copies. The memory belongs to a process group, whose ranks use it in place of sockets where all
of them can open it. ``AUTOTP_SHARED_MEMORY=0`` leaves everything to the group.
"""

from __future__ import annotations

import logging
import os
import secrets
import weakref
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp.native import operators

# Bytes of one of a rank's two slots; a longer message goes in pieces. Larger ones gain nothing, and
# containers often have no more than 64 MB of shared memory.
_SLOT = 1 << 20
_SUMMED = frozenset({torch.float32, torch.float64, torch.bfloat16})
_HOST = torch.device("cpu")

_log = logging.getLogger("deepspeed_autotp")

_ops = operators.loaded()


class Started(Protocol):
    """A collective that is on its way."""

    def wait(self) -> object: ...


class SharedMemory:
    """The memory that the ranks of one process group share. All of them make every call.

    RuntimeError where a rank has ended, does not come within the time limit of the group, or
    hands over something else than the others.
    """

    def __init__(self, number: int, seconds: float) -> None:
        self._number = number
        self._seconds = seconds
        self._started: _Sum | None = None
        self._is_open = True
        self._close = weakref.finalize(self, _ops.shm_close, number)

    def sums(self, x: Tensor) -> bool:
        """Whether tensors like ``x`` can be summed."""
        return self.gathers(x) and x.dtype in _SUMMED

    def gathers(self, x: Tensor) -> bool:
        """Whether tensors like ``x`` can be gathered."""
        return self._is_open and x.device.type == "cpu"

    def start_sum(self, x: Tensor, *, into: Tensor, first: int = 0) -> Started:
        """Hand contiguous ``x`` over. When it is waited for, as many items of the sum over the
        ranks as ``into`` has, from item ``first`` on, are put there; it may be ``x``."""
        self._finish()
        started = _Sum(self, x.detach(), into.detach(), first)
        _ops.shm_start_sum(self._number, started.x, started.into, first, self._seconds)
        self._started = started
        return started

    def gather(self, x: Tensor, *, into: Tensor) -> None:
        """Put the tensors of all ranks, each as large as contiguous ``x``, one after the other."""
        self._finish()
        _ops.shm_gather(self._number, x.detach(), into.detach(), self._seconds)

    def become(self, other: SharedMemory | None) -> None:
        """Take over what ``other`` has opened; without it, leave everything to the group."""
        self._close()
        self._started = None
        self._is_open = other is not None
        if other is not None:
            other._close.detach()
            self._number = other._number
            self._close = weakref.finalize(self, _ops.shm_close, self._number)

    def finish(self, started: _Sum) -> None:
        """Wait for a sum, unless that was done."""
        if self._started is started:
            self._finish()

    def _finish(self) -> None:
        """Messages are taken one after the other: a sum that nobody has waited for, maybe since
        the caller failed in between, is taken before the next one starts."""
        if (one := self._started) is not None:
            self._started = None
            _ops.shm_take_sum(self._number, one.x, one.into, one.first, self._seconds)


@dataclass(frozen=True, slots=True, eq=False)
class _Sum:
    """A sum that was started."""

    memory: SharedMemory
    x: Tensor
    into: Tensor
    first: int

    def wait(self) -> None:
        self.memory.finish(self)


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


def renew(handle: dist.ProcessGroup) -> None:
    """Give all who use the memory of a group a fresh one. All its ranks call it.

    Where a collective has failed none can follow: some ranks have taken what others have not.
    """
    memory = _known.get(handle)
    if memory is not None:
        memory.become(_opened(handle))


def _opened(handle: dist.ProcessGroup) -> SharedMemory | None:
    seconds = _time_limit(handle)
    if seconds is None or handle.size() == 1:
        return None
    # No number of a process: those of two containers can be the same.
    token = torch.tensor(secrets.randbits(62), device=_HOST)
    memory = None
    if handle.rank() == 0:  # it makes the memory, before the others look for it
        memory = _open(_name(token), handle, seconds)
    try:
        dist.broadcast(token, dist.get_global_rank(handle, 0), group=handle)
        if handle.rank() > 0:
            memory = _open(_name(token), handle, seconds)
        everyone = torch.tensor(memory is not None, dtype=torch.int32, device=_HOST)
        dist.all_reduce(everyone, dist.ReduceOp.MIN, group=handle)
    finally:
        if handle.rank() == 0:
            _ops.shm_unlink(_name(token))
    return memory if everyone else None


def _name(token: Tensor) -> str:
    return f"/autotp-{int(token):016x}"


def _open(name: str, handle: dist.ProcessGroup, seconds: float) -> SharedMemory | None:
    """None where the memory cannot be had or is not wanted."""
    if os.environ.get("AUTOTP_SHARED_MEMORY") == "0":
        return None
    try:
        number: int = _ops.shm_open(name, handle.rank(), handle.size(), _SLOT)
    except RuntimeError as error:
        # On another host there is nothing of that name, which is as it should be.
        _log.info("rank %d of its group sums through sockets: %s", handle.rank(), error)
        return None
    return SharedMemory(number, seconds)


def check_environment() -> None:
    """ValueError for a value of ``AUTOTP_SHARED_MEMORY`` that means nothing."""
    value = os.environ.get("AUTOTP_SHARED_MEMORY", "1")
    if value not in ("0", "1"):
        raise ValueError(f"AUTOTP_SHARED_MEMORY is {value!r}, expected 0 or 1")


def described() -> str:
    """For a user: how ranks of one host sum and gather."""
    try:
        check_environment()
    except ValueError as error:
        return str(error)
    if os.environ.get("AUTOTP_SHARED_MEMORY") == "0":
        return "also between ranks of one host, as AUTOTP_SHARED_MEMORY is 0"
    return "and memory that ranks of one host share"


def _time_limit(handle: dist.ProcessGroup) -> float | None:
    """Seconds that a collective on host tensors may take; None where gloo does not carry them."""
    if _HOST not in handle._device_types or not dist.is_gloo_available():
        return None
    backend = handle._get_backend(_HOST)
    if not isinstance(backend, dist.ProcessGroupGloo):
        return None
    seconds: float = backend.options._timeout.total_seconds()
    return seconds
