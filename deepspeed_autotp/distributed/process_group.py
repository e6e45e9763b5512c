# SPDX-License-Identifier: Apache-2.0
"""A tensor-parallel process group and its collectives; knows nothing of autograd or of layers.

A tensor is moved on the device that it is on, also by a group with a backend for each device, as
torch's default ``cpu:gloo,cuda:nccl``. A group that takes no CPU tensors, as NCCL's, is given one
beside it that does.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp.distributed.lost_ranks import LostRanks, Work
from deepspeed_autotp.distributed.model_groups import ModelGroups, Subgroups
from deepspeed_autotp.distributed.owned_groups import OwnedGroups
from deepspeed_autotp.distributed.shared_memory import SharedMemory, reopen, shared_memory
from deepspeed_autotp.interop.torch_private import is_gloo
from deepspeed_autotp.interop.traced_collectives import (
    traced_all_gather,
    traced_all_reduce,
    traced_reduce_scatter,
)

_CPU = torch.device("cpu")


def _collective(name: str, deprecated: str) -> Callable[..., Any]:
    """A function of torch.distributed; torch 2.13 warns of its ``deprecated`` name."""
    known = vars(dist)
    function: Callable[..., Any] = known[name] if name in known else known[deprecated]
    return function


class TPGroup:
    """One tensor-parallel process group, and what was made for it: ``owned``, and shared memory.

    ``before_collective`` is called before every collective with its description, or an empty one;
    a rank that fails between two collectives can then tell the others (failure_barrier.py).
    """

    def __init__(self, handle: dist.ProcessGroup, owned: OwnedGroups | None = None) -> None:
        self.rank = dist.get_rank(handle)
        self.size = dist.get_world_size(handle)
        self.global_ranks = tuple(dist.get_process_group_ranks(handle))
        self.before_collective: Callable[[str], None] | None = None
        self._groups = ModelGroups(handle, OwnedGroups() if owned is None else owned)
        self._users: weakref.WeakSet[object] = weakref.WeakSet()
        self._is_sharing_memory = False
        self._memory: SharedMemory | None = None
        self._lost = LostRanks.of(handle, "a TP group")

    @property
    def handle(self) -> dist.ProcessGroup:
        """The process group itself."""
        return self._groups.opened().own

    @property
    def cpu_handle(self) -> dist.ProcessGroup:
        """A process group over the same ranks that takes CPU tensors, and so objects."""
        return self._groups.opened().cpu

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._groups.is_closed

    def reopen(self, handle: dist.ProcessGroup) -> None:
        """After :meth:`close`, go on with a group of the same ranks. All ranks call it."""
        self._groups.open(handle)
        if self._is_sharing_memory:
            self.share_memory()

    def set_hosts(self, hosts: Mapping[int, str]) -> None:
        """Name the hosts of ranks, for errors about ranks that are gone."""
        self._lost.hosts = {rank: hosts[rank] for rank in self.global_ranks}

    def join(self, user: object) -> None:
        """Note a model that uses this group, as a copy does that of its original."""
        self._users.add(user)

    def leave(self, user: object) -> None:
        """As :meth:`close`, unless another model uses this group. All ranks call it."""
        self._users.discard(user)
        if not self._users:
            self.close()

    def close(self) -> None:
        """Close what was made for this group; later collectives are a RuntimeError. All ranks
        call it."""
        self._memory = None
        self._groups.close()

    def share_memory(self) -> None:
        """Use shared memory for CPU tensors where that is possible. All ranks call it."""
        self._is_sharing_memory = True
        self._memory = shared_memory(self.cpu_handle)

    def set_call(self, call: int, digest: int) -> bool:
        """Let shared memory tell collectives of call ``call`` of the model, with inputs of
        ``digest``, from those of other calls; whether there is shared memory."""
        if self._memory is None:
            return False
        self._memory.set_call(call, digest)
        return True

    def recover(self) -> None:
        """Make collectives possible again after one has failed on some rank. All ranks call it."""
        if self._memory is not None:
            reopen(self._memory, self.cpu_handle)

    def handle_for(self, device: torch.device) -> dist.ProcessGroup:
        """The process group that moves tensors that are on ``device``."""
        return self._groups.opened().on(device)

    def point_to_point_device(self, device: torch.device) -> torch.device:
        """Where tensors on ``device`` have to be to be sent to one rank: gloo takes CPU tensors
        only."""
        return _CPU if is_gloo(self.handle_for(device), device) else device

    def open_subgroups(self, wanted: Sequence[Subgroups]) -> None:
        """Make what :meth:`all_reduce_in` needs, unless it was made. All ranks call it."""
        self._groups.open_subgroups(wanted)

    def announce(self, what: str = "") -> None:
        """Call ``before_collective``; ``what`` describes the collective, equal on all ranks."""
        if self.before_collective is not None:
            self.before_collective(what)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum ``x`` over the ranks and return it: in place where it is contiguous, and as a new
        tensor under torch.compile, which has functional collectives only."""
        if torch.compiler.is_compiling():
            return traced_all_reduce(x.contiguous(), self.handle_for(x.device))
        x = x.contiguous()
        self.announce()
        with self._lost:
            if self._memory is not None and self._memory.can_reduce(x):
                self._memory.start_reduce(x, into=x).wait()
            else:
                dist.all_reduce(x, group=self.handle_for(x.device))
        return x

    def start_all_reduce(self, x: Tensor) -> Work:
        """Start to sum contiguous ``x`` over the ranks in place; wait for what is returned."""
        self.announce()
        work: Work
        with self._lost:
            if self._memory is not None and self._memory.can_reduce(x):
                work = self._memory.start_reduce(x, into=x)
            else:
                work = dist.all_reduce(x, group=self.handle_for(x.device), async_op=True)
        return self._lost.watch(work)

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
            received = traced_all_gather(sent.contiguous(), self.handle_for(x.device))
            return _unpadded(received.view(self.size, longest), sizes, shapes)
        self.announce()
        received = sent.new_empty(self.size, longest)
        self.all_gather_into(sent.contiguous(), into=received)
        return _unpadded(received, sizes, shapes)

    def all_gather_rows(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """Every rank's rows of dimension 0, concatenated in rank order.

        ``widths[rank]`` is how many that rank has, under torch.compile as many as the others; they
        are padded to the longest, as above.
        """
        if torch.compiler.is_compiling():
            return traced_all_gather(x.contiguous(), self.handle_for(x.device))
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

    def all_gather_into(self, x: Tensor, *, into: Tensor, of_any_pass: bool = False) -> None:
        """Every rank's contiguous ``x``, in rank order, without an announcement. ``of_any_pass``:
        some ranks may be in a backward pass, and others not."""
        with self._lost:
            if self._memory is not None and self._memory.can_gather(x):
                self._memory.all_gather(x, into=into, of_any_pass=of_any_pass)
                return
            # As bytes: gloo has no all-gather for every dtype, and copies need no arithmetic.
            _collective("all_gather_single", "all_gather_into_tensor")(
                into.view(-1).view(torch.uint8),
                x.view(-1).view(torch.uint8),
                group=self.handle_for(x.device),
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
            with self._lost:
                started = self._memory.start_reduce(sent, into=own, first=first)
            return self._lost.watch(started), own
        if min(widths) < longest:
            sent = x.new_zeros(self.size, longest, *x.shape[1:])
            for row, part in zip(sent, x.split(list(widths)), strict=True):
                row[: part.shape[0]].copy_(part)
        received = x.new_empty(longest, *x.shape[1:])
        with self._lost:
            work: Work = _collective("reduce_scatter_single", "reduce_scatter_tensor")(
                received,
                sent.view(self.size * longest, *x.shape[1:]),
                group=self.handle_for(x.device),
                async_op=True,
            )
        return self._lost.watch(work), received[: widths[self.rank]]

    def reduce_scatter_rows(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """This rank's rows of the sum of ``x`` over the ranks, as :meth:`start_reduce_scatter`.

        Under torch.compile all ranks get as many.
        """
        if torch.compiler.is_compiling():
            return traced_reduce_scatter(x.contiguous(), self.handle_for(x.device))
        work, rows = self.start_reduce_scatter(x, widths)
        work.wait()
        return rows

    def broadcast(self, x: Tensor, *, via: torch.device | None = None) -> None:
        """Overwrite ``x`` with the value of TP rank 0. ``via`` is of one type on all ranks, as the
        device of ``x`` has to be without it."""
        sent = x.detach().reshape(-1)
        if via is not None:
            sent = sent.to(via)
        handle = self.handle_for(sent.device)
        with self._lost:
            dist.broadcast(sent.view(torch.uint8), src=self.global_ranks[0], group=handle)
        if self.rank > 0:  # TP rank 0 may have it in memory that must not be written to
            x.detach().copy_(sent.reshape(x.shape))

    def all_reduce_in(self, subgroups: Subgroups, x: Tensor) -> Tensor:
        """Sum ``x`` over the ranks that hold the same runs as this one, of which there are more."""
        x = x.contiguous()
        handle = self._groups.subgroup(subgroups).on(x.device)
        if torch.compiler.is_compiling():
            return traced_all_reduce(x, handle)
        with self._lost:
            dist.all_reduce(x, group=handle)
        return x

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
