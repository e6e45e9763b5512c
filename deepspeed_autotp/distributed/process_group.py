# SPDX-License-Identifier: Apache-2.0
"""A tensor-parallel process group and its collectives; knows nothing of autograd or of layers."""

from __future__ import annotations

import atexit
import functools
import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from deepspeed_autotp.distributed.shared_memory import SharedMemory, Work, reopen, shared_memory
from deepspeed_autotp.interop.process_groups import backend_timeout

# Seconds that the end of a process waits for gloo's threads.
_EXIT_PAUSE = 0.1


def _collective(name: str, deprecated: str) -> Callable[..., Any]:
    """A function of torch.distributed; torch 2.13 warns of its ``deprecated`` name."""
    known = vars(dist)
    function: Callable[..., Any] = known[name] if name in known else known[deprecated]
    return function


class TPGroup:
    """One tensor-parallel process group.

    ``before_collective`` is called before every collective with its description, or an empty one;
    a rank that fails between two collectives can then tell the others (failure_barrier.py).
    """

    def __init__(self, handle: dist.ProcessGroup) -> None:
        self.handle = handle
        self.rank = dist.get_rank(handle)
        self.size = dist.get_world_size(handle)
        self.global_ranks = tuple(dist.get_process_group_ranks(handle))
        self.device = torch.device("cpu") if supports_cpu_tensors(handle) else torch.device("cuda")
        if supports_cpu_tensors(handle):
            _pause_at_exit()
        self.before_collective: Callable[[str], None] | None = None
        self._memory: SharedMemory | None = None
        self._subgroups: dict[tuple[tuple[int, int], ...], dist.ProcessGroup] = {}

    def share_memory(self) -> None:
        """Use shared memory for CPU tensors where that is possible. All ranks call it."""
        self._memory = shared_memory(self.handle)

    def recover(self) -> None:
        """Make collectives possible again after one has failed on some rank. All ranks call it."""
        reopen(self.handle)

    def announce(self, what: str = "") -> None:
        """Call ``before_collective``; ``what`` describes the collective, equal on all ranks."""
        if self.before_collective is not None:
            self.before_collective(what)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum ``x`` over the ranks and return it: in place where it is contiguous, and as a new
        tensor under torch.compile, which has functional collectives only."""
        if torch.compiler.is_compiling():
            summed: Tensor = functional.all_reduce(x.contiguous(), "sum", self.handle)
            return summed
        x = x.contiguous()
        self.announce()
        if self._memory is not None and self._memory.can_reduce(x):
            self._memory.start_reduce(x, into=x).wait()
        else:
            dist.all_reduce(x, group=self.handle)
        return x

    def start_all_reduce(self, x: Tensor) -> Work:
        """Start to sum contiguous ``x`` over the ranks in place; wait for what is returned."""
        self.announce()
        if self._memory is not None and self._memory.can_reduce(x):
            return self._memory.start_reduce(x, into=x)
        work: Work = dist.all_reduce(x, group=self.handle, async_op=True)
        return work

    def all_gather(self, x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Every rank's tensor, in rank order; ``shapes[rank]`` is the shape of that rank's.

        Shapes may differ: all are padded to the longest, which gloo needs and NCCL prefers.
        """
        sizes = [math.prod(shape) for shape in shapes]
        longest = max(sizes)
        sent = x.reshape(-1)
        if sent.numel() < longest:
            sent = torch.cat([sent, sent.new_zeros(longest - sent.numel())])
        if torch.compiler.is_compiling():
            received = functional.all_gather_tensor(sent.contiguous(), 0, self.handle)
            return _unpadded(received.view(self.size, longest), sizes, shapes)
        self.announce()
        received = sent.new_empty(self.size, longest)
        self.all_gather_into(sent.contiguous(), into=received)
        return _unpadded(received, sizes, shapes)

    def all_gather_rows(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """Every rank's rows of dimension 0, concatenated in rank order.

        ``widths[rank]`` is how many that rank has; they are padded to the longest, as above.
        """
        self.announce()
        longest = max(widths)
        sent = x.contiguous()
        if x.shape[0] < longest:
            sent = torch.cat([sent, x.new_zeros(longest - x.shape[0], *x.shape[1:])])
        received = x.new_empty(self.size, longest, *x.shape[1:])
        self.all_gather_into(sent, into=received)
        if min(widths) == longest:
            return received.flatten(0, 1)
        return torch.cat([part[:width] for part, width in zip(received, widths, strict=True)])

    def all_gather_into(self, x: Tensor, *, into: Tensor) -> None:
        """Every rank's contiguous ``x``, in rank order, without an announcement."""
        if self._memory is not None and self._memory.can_gather(x):
            self._memory.all_gather(x, into=into)
            return
        # As bytes: gloo has no all-gather for every dtype, and copies need no arithmetic.
        _collective("all_gather_single", "all_gather_into_tensor")(
            into.view(-1).view(torch.uint8), x.view(-1).view(torch.uint8), group=self.handle
        )

    def start_reduce_scatter(self, x: Tensor, widths: Sequence[int]) -> tuple[Work, Tensor]:
        """Start to sum ``x`` over the ranks; this rank's rows of the sum, valid after the wait.

        ``widths[rank]`` is how many rows of dimension 0 that rank gets. Those of all are padded to
        the longest, as in ``all_gather``; ``x`` is not changed and may be freed.
        """
        self.announce()
        longest = max(widths)
        sent = x.contiguous()
        if self._memory is not None and self._memory.can_reduce(sent):
            own = x.new_empty(widths[self.rank], *x.shape[1:])
            first = sum(widths[: self.rank]) * math.prod(x.shape[1:])
            return self._memory.start_reduce(sent, into=own, first=first), own
        if min(widths) < longest:
            sent = x.new_zeros(self.size, longest, *x.shape[1:])
            for row, part in zip(sent, x.split(list(widths)), strict=True):
                row[: part.shape[0]].copy_(part)
        received = x.new_empty(longest, *x.shape[1:])
        work: Work = _collective("reduce_scatter_single", "reduce_scatter_tensor")(
            received, sent.view(self.size * longest, *x.shape[1:]), group=self.handle, async_op=True
        )
        return work, received[: widths[self.rank]]

    def broadcast(self, x: Tensor) -> None:
        """Overwrite ``x`` with the value of TP rank 0."""
        sent = x.detach().reshape(-1).to(self.device)
        dist.broadcast(sent.view(torch.uint8), src=self.global_ranks[0], group=self.handle)
        if self.rank > 0:  # TP rank 0 may have it in memory that must not be written to
            x.detach().copy_(sent.reshape(x.shape))

    def all_reduce_in(self, subgroup: dist.ProcessGroup, x: Tensor) -> Tensor:
        """Sum ``x`` over the ranks of ``subgroup``, of which this is one."""
        x = x.contiguous()
        dist.all_reduce(x, group=subgroup)
        return x

    def subgroup(self, subgroups: tuple[tuple[int, int], ...]) -> dist.ProcessGroup:
        """The process group of the ranks that hold the same runs as this one.

        ``subgroups[rank]`` is the lowest rank and the number of ranks of that rank's subgroup. All
        ranks call it, also one that is alone in its subgroup: torch names a group made by its
        members alone after the number of groups that they have, which must stay the same on
        all ranks or the next such group is never found.
        """
        owner, holders = subgroups[self.rank]
        if holders == self.size:
            return self.handle
        if subgroups not in self._subgroups:
            self._subgroups[subgroups] = dist.new_group(
                list(self.global_ranks[owner : owner + holders]),
                backend="gloo" if dist.get_backend(self.handle) == "gloo" else None,
                timeout=group_timeout(self.handle),
                use_local_synchronization=True,
            )
        return self._subgroups[subgroups]

    def __deepcopy__(self, memo: object) -> TPGroup:
        """The same object: a copy of a model is on the same ranks."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "cannot pickle a sharded model: it holds a process group; save model.state_dict(), "
            "which has this rank's shards, or deepspeed_autotp.full_state_dict(model), which has "
            "the full weights"
        )


def _unpadded(
    received: Tensor, sizes: Sequence[int], shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The ranks' tensors, from rows that were padded to the longest."""
    return [
        row[:size].reshape(shape) for row, size, shape in zip(received, sizes, shapes, strict=True)
    ]


def cpu_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A gloo group over ``ranks`` (global, this rank among them), for CPU tensors and objects.

    Only those ranks have to call it.
    """
    everyone = len(ranks) == dist.get_world_size()
    world = dist.group.WORLD
    # NCCL's default timeout is shorter than gloo's, and not meant for loading a model.
    timeout = group_timeout(world) if world is not None and supports_cpu_tensors(world) else None
    made: dist.ProcessGroup = dist.new_group(
        list(ranks), backend="gloo", timeout=timeout, use_local_synchronization=not everyone
    )
    _pause_at_exit()
    return made


def group_timeout(handle: dist.ProcessGroup) -> timedelta | None:
    """The timeout of collectives; None where the backend does not say."""
    device = torch.device("cpu") if supports_cpu_tensors(handle) else torch.device("cuda")
    return backend_timeout(handle._get_backend(device))


def supports_cpu_tensors(handle: dist.ProcessGroup) -> bool:
    """Whether collectives of ``handle`` take CPU tensors."""
    return torch.device("cpu") in handle._device_types


@functools.cache
def _pause_at_exit() -> None:
    """Let gloo's threads release the tensors of the last collectives before Python finalizes.

    A gloo thread takes the GIL to release a tensor. One that asks for it after finalization has
    begun is killed by CPython inside a destructor, which aborts a run that has succeeded.
    DeepSpeed's module globals keep groups past ``destroy_process_group``, so their threads
    cannot be joined; sleeping releases the GIL.
    """
    atexit.register(time.sleep, _EXIT_PAUSE)
