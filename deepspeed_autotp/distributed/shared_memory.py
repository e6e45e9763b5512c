# SPDX-License-Identifier: Apache-2.0
"""All-reduce, reduce-scatter and all-gather of CPU tensors in shared memory, within one machine.

A gloo process group moves every byte through a socket, and wakes two threads for it: a sum of
256 KB over two ranks takes a millisecond. In shared memory it takes as long as two copies. The
memory belongs to a process group, whose ranks use it in place of sockets where all of them can
open it. ``AUTOTP_SHARED_MEMORY=0`` disables it.
"""

from __future__ import annotations

import logging
import os
import secrets
import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp.distributed.lost_ranks import Work
from deepspeed_autotp.distributed.owned_groups import supports_cpu_tensors
from deepspeed_autotp.interop.torch_private import backend_timeout, backward_id, is_gloo
from deepspeed_autotp.native import operators

# Bytes of one of a rank's two slots; a larger tensor goes in chunks. Larger slots gain nothing, and
# containers often have no more than 64 MB of shared memory.
_SLOT = 1 << 20
_REDUCED = frozenset({torch.float32, torch.float64, torch.bfloat16})
_CPU = torch.device("cpu")

_log = logging.getLogger("deepspeed_autotp")


class SharedMemory:
    """The memory that the ranks of one process group share. All of them make every call.

    RuntimeError where a rank has ended, does not take part within the timeout of the group, or
    gives a tensor of another size or dtype than the others, or of another call of the model.
    """

    def __init__(self, handle: int, process_group: dist.ProcessGroup, seconds: float) -> None:
        self.seconds = seconds
        self._handle = handle
        self._process_group = weakref.ref(process_group)
        self._pending: _Reduction | None = None
        self._is_open = True
        self._close = weakref.finalize(self, operators.loaded().shm_close, handle)

    def belongs_to(self, process_group: dist.ProcessGroup) -> bool:
        """Whether it is the memory of a group."""
        return self._process_group() is process_group

    def can_reduce(self, x: Tensor) -> bool:
        """Whether tensors like ``x`` can be summed."""
        return self.can_gather(x) and x.dtype in _REDUCED

    def can_gather(self, x: Tensor) -> bool:
        """Whether tensors like ``x`` can be gathered."""
        return self._is_open and x.device.type == "cpu"

    def start_reduce(self, x: Tensor, *, into: Tensor, first: int = 0) -> Work:
        """Start to sum contiguous ``x`` over the ranks. The wait fills ``into``, which may be
        ``x``, with the elements of the sum from ``first`` on."""
        self._finish_pending()
        work = _Reduction(self, x.detach(), into.detach(), first)
        start_sum, backward = operators.loaded().shm_start_sum, backward_id() >= 0
        start_sum(self._handle, work.x, work.into, first, backward, self.seconds)
        self._pending = work
        return work

    def all_gather(self, x: Tensor, *, into: Tensor, of_any_pass: bool = False) -> None:
        """Fill ``into`` with the tensors of all ranks, each as large as contiguous ``x``. Unless it
        is ``of_any_pass``, either all ranks are in a backward pass or none."""
        self._finish_pending()
        gather = operators.loaded().shm_gather
        backward = backward_id() >= 0 and not of_any_pass
        gather(self._handle, x.detach(), into.detach(), backward, self.seconds)

    def set_call(self, call: int, digest: int) -> None:
        """Say that call ``call`` of a model begins, with inputs of ``digest``: collectives of other
        calls are no partners of those that follow."""
        if self._is_open:
            operators.loaded().shm_set_call(self._handle, call, digest)

    def replace_with(self, other: SharedMemory | None) -> None:
        """Take over the memory of ``other``; None leaves all collectives to the group."""
        self._close()
        self._pending = None
        self._is_open = other is not None
        if other is not None:
            other._close.detach()
            self._handle = other._handle
            self._close = weakref.finalize(self, operators.loaded().shm_close, self._handle)

    def finish(self, work: _Reduction) -> None:
        """Wait for a sum, unless that was done."""
        if self._pending is work:
            self._finish_pending()

    def _finish_pending(self) -> None:
        """Sums complete in order: one that was not waited for, maybe since the caller failed
        in between, completes before the next collective starts."""
        if (work := self._pending) is not None:
            self._pending = None
            take_sum = operators.loaded().shm_take_sum
            take_sum(self._handle, work.x, work.into, work.first, self.seconds)


@dataclass(frozen=True, slots=True, eq=False)
class _Reduction:
    """A sum that was started."""

    memory: SharedMemory
    x: Tensor
    into: Tensor
    first: int

    def wait(self) -> None:
        self.memory.finish(self)


# All memories in use, by the integer in their names.
_open_memories: weakref.WeakValueDictionary[int, SharedMemory] = weakref.WeakValueDictionary()


def shared_memory(process_group: dist.ProcessGroup) -> SharedMemory | None:
    """Memory for a group, or None where some rank cannot open it. All its ranks call it.

    Callers that have one at the same time have the same one. It is closed when none has it. None
    also for a group of one rank, and for a backend other than gloo.
    """
    seconds = _timeout_seconds(process_group)
    if seconds is None or process_group.size() == 1:
        return None
    # A rank may still have a memory that others have closed: rank 0 offers its own one.
    found = (token for token, memory in _open_memories.items() if memory.belongs_to(process_group))
    offered = torch.tensor(next(found, 0), device=_CPU)
    dist.broadcast(offered, dist.get_global_rank(process_group, 0), group=process_group)
    memory = _open_memories.get(int(offered))
    if _is_true_on_all_ranks(memory is not None, process_group):
        return memory
    return _open_on_all_ranks(process_group, seconds)


def reopen(memory: SharedMemory, process_group: dist.ProcessGroup) -> None:
    """Give all users of the memory of a group a new one. All its ranks call it.

    After a collective has failed, the ranks disagree about what is in the slots.
    """
    memory.replace_with(_open_on_all_ranks(process_group, memory.seconds))


def _open_on_all_ranks(process_group: dist.ProcessGroup, seconds: float) -> SharedMemory | None:
    # Not a process id: those of two containers can be equal.
    token = torch.tensor(secrets.randbits(62), device=_CPU)
    memory = None
    if process_group.rank() == 0:  # creates the memory, before the others open it
        memory = _open(token, process_group, seconds)
    try:
        dist.broadcast(token, dist.get_global_rank(process_group, 0), group=process_group)
        if process_group.rank() > 0:
            memory = _open(token, process_group, seconds)
        on_all_ranks = _is_true_on_all_ranks(memory is not None, process_group)
    finally:
        if process_group.rank() == 0:
            operators.loaded().shm_unlink(_name(token))
    if memory is None or not on_all_ranks:
        return None
    _open_memories[int(token)] = memory
    return memory


def _is_true_on_all_ranks(mine: bool, process_group: dist.ProcessGroup) -> bool:
    flag = torch.tensor(mine, dtype=torch.int32, device=_CPU)
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=process_group)
    return bool(flag)


def _name(token: Tensor) -> str:
    return f"/autotp-{int(token):016x}"


def _open(token: Tensor, process_group: dist.ProcessGroup, seconds: float) -> SharedMemory | None:
    """None where the memory cannot be opened or is disabled."""
    if os.environ.get("AUTOTP_SHARED_MEMORY") == "0":
        return None
    try:
        rank, size = process_group.rank(), process_group.size()
        handle: int = operators.loaded().shm_open(_name(token), rank, size, _SLOT)
    except RuntimeError as error:
        # Expected for a rank on another machine, where there is no memory of that name.
        _log.info(
            "rank %d of its group uses sockets instead of shared memory: %s",
            process_group.rank(),
            error,
        )
        return None
    return SharedMemory(handle, process_group, seconds)


def check_environment() -> None:
    """ValueError unless ``AUTOTP_SHARED_MEMORY`` is 0, 1 or unset."""
    value = os.environ.get("AUTOTP_SHARED_MEMORY", "1")
    if value not in ("0", "1"):
        raise ValueError(
            f"AUTOTP_SHARED_MEMORY is {value!r}, expected 0 or 1; unset it to use shared memory"
        )


def describe_use() -> str:
    """For a user: whether ranks on one machine use shared memory."""
    try:
        check_environment()
    except ValueError as error:
        return str(error)
    if os.environ.get("AUTOTP_SHARED_MEMORY") == "0":
        return "without shared memory, as AUTOTP_SHARED_MEMORY is 0"
    return "and shared memory between ranks on one machine"


def _timeout_seconds(process_group: dist.ProcessGroup) -> float | None:
    """The timeout of collectives on CPU tensors; None where their backend is not gloo."""
    if not supports_cpu_tensors(process_group) or not is_gloo(process_group, _CPU):
        return None
    timeout = backend_timeout(process_group, _CPU)
    return None if timeout is None else timeout.total_seconds()
