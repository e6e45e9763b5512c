# SPDX-License-Identifier: Apache-2.0
"""The ranks that share one model, seen from this rank.

Owns the process group and its collectives; knows nothing of autograd or of layers.
"""

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

from deepspeed_autotp import interop
from deepspeed_autotp.distributed.rng import Fork
from deepspeed_autotp.distributed.shared_memory import SharedMemory, Started, renew, shared_memory

# Seconds that the end of a process waits for gloo's threads.
_EXIT_PAUSE = 0.1


def _collective(name: str, before: str) -> Callable[..., Any]:
    """A function of torch.distributed; torch 2.13 warns of the name that it had ``before``."""
    known = vars(dist)
    function: Callable[..., Any] = known[name] if name in known else known[before]
    return function


class TPGroup:
    """One tensor-parallel process group.

    ``before`` is called ahead of every collective with words for it, or none; a rank that fails
    between two collectives can then tell the others instead of leaving them waiting.
    """

    def __init__(self, handle: dist.ProcessGroup) -> None:
        self.handle = handle
        self.rank = dist.get_rank(handle)
        self.size = dist.get_world_size(handle)
        self.global_ranks = tuple(dist.get_process_group_ranks(handle))
        self.device = torch.device("cpu") if moves_host_tensors(handle) else torch.device("cuda")
        if moves_host_tensors(handle):
            _pause_at_exit()
        self.before: Callable[[str], None] | None = None
        self._memory: SharedMemory | None = None
        self.fork = Fork(self.rank)
        self._blocks: dict[tuple[tuple[int, int], ...], dist.ProcessGroup] = {}

    def share_memory(self) -> None:
        """Use memory that the ranks share where that is possible. All of them call it."""
        self._memory = shared_memory(self.handle)

    def recover(self) -> None:
        """Make collectives possible again after one has failed on some rank. All ranks call it."""
        renew(self.handle)

    def step(self, what: str = "") -> None:
        """Announce a collective to whoever set ``before``; ``what`` says which, alike on all."""
        if self.before is not None:
            self.before(what)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum ``x`` over the ranks and return it: in place where it is contiguous, and a new
        tensor in a graph that is compiled, which has functional collectives only."""
        if torch.compiler.is_compiling():
            summed: Tensor = functional.all_reduce(x.contiguous(), "sum", self.handle)
            return summed
        x = x.contiguous()
        self.step()
        if self._memory is not None and self._memory.sums(x):
            self._memory.start_sum(x, into=x).wait()
        else:
            dist.all_reduce(x, group=self.handle)
        return x

    def start_all_reduce(self, x: Tensor) -> Started:
        """Begin to sum contiguous ``x`` over the ranks in place; wait for what is returned."""
        self.step()
        if self._memory is not None and self._memory.sums(x):
            return self._memory.start_sum(x, into=x)
        started: Started = dist.all_reduce(x, group=self.handle, async_op=True)
        return started

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
            return _parted(received.view(self.size, longest), sizes, shapes)
        self.step()
        received = sent.new_empty(self.size, longest)
        self.gather(sent.contiguous(), into=received)
        return _parted(received, sizes, shapes)

    def all_gather_rows(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """Every rank's rows of dimension 0, one rank's after the other's.

        ``widths[rank]`` is how many that rank has; they are padded to the longest, as above.
        """
        self.step()
        longest = max(widths)
        sent = x.contiguous()
        if x.shape[0] < longest:
            sent = torch.cat([sent, x.new_zeros(longest - x.shape[0], *x.shape[1:])])
        received = x.new_empty(self.size, longest, *x.shape[1:])
        self.gather(sent, into=received)
        if min(widths) == longest:
            return received.flatten(0, 1)
        return torch.cat([part[:width] for part, width in zip(received, widths, strict=True)])

    def gather(self, x: Tensor, *, into: Tensor) -> None:
        """Every rank's contiguous ``x``, one after the other, without a step ahead of it."""
        if self._memory is not None and self._memory.gathers(x):
            self._memory.gather(x, into=into)
            return
        # Bytes travel: gloo has no gather for every dtype, and copies need no arithmetic.
        _collective("all_gather_single", "all_gather_into_tensor")(
            into.view(-1).view(torch.uint8), x.view(-1).view(torch.uint8), group=self.handle
        )

    def start_reduce_scatter(self, x: Tensor, widths: Sequence[int]) -> tuple[Started, Tensor]:
        """Begin to sum ``x`` over the ranks; this rank's rows of the sum, once it was waited for.

        ``widths[rank]`` is how many rows of dimension 0 that rank gets. Those of all are padded to
        the longest, as in ``all_gather``; ``x`` is left as it is and may be let go of.
        """
        self.step()
        longest = max(widths)
        sent = x.contiguous()
        if self._memory is not None and self._memory.sums(sent):
            own = x.new_empty(widths[self.rank], *x.shape[1:])
            first = sum(widths[: self.rank]) * math.prod(x.shape[1:])
            return self._memory.start_sum(sent, into=own, first=first), own
        if min(widths) < longest:
            sent = x.new_zeros(self.size, longest, *x.shape[1:])
            for row, part in zip(sent, x.split(list(widths)), strict=True):
                row[: part.shape[0]].copy_(part)
        received = x.new_empty(longest, *x.shape[1:])
        started: Started = _collective("reduce_scatter_single", "reduce_scatter_tensor")(
            received, sent.view(self.size * longest, *x.shape[1:]), group=self.handle, async_op=True
        )
        return started, received[: widths[self.rank]]

    def broadcast(self, x: Tensor) -> None:
        """Overwrite ``x`` with the value that the first rank has."""
        sent = x.detach().reshape(-1).to(self.device)
        # Bytes travel, as above.
        dist.broadcast(sent.view(torch.uint8), src=self.global_ranks[0], group=self.handle)
        if self.rank > 0:  # the first has it, maybe in memory that must not be written to
            x.detach().copy_(sent.reshape(x.shape))

    def sum_in(self, block: dist.ProcessGroup, x: Tensor) -> Tensor:
        """Sum ``x`` over the ranks of ``block``, of which this is one."""
        x = x.contiguous()
        dist.all_reduce(x, group=block)
        return x

    def block(self, blocks: tuple[tuple[int, int], ...]) -> dist.ProcessGroup:
        """The group of the ranks that hold the same as this one.

        ``blocks[rank]`` is the first rank and the number of ranks of that rank's block. Every
        rank calls it, also one that is alone in its block: torch names a group made by its
        members alone after the number of groups that they have, which must stay the same on
        all ranks or the next such group is never found.
        """
        owner, holders = blocks[self.rank]
        if holders == self.size:
            return self.handle
        if blocks not in self._blocks:
            self._blocks[blocks] = dist.new_group(
                list(self.global_ranks[owner : owner + holders]),
                backend="gloo" if dist.get_backend(self.handle) == "gloo" else None,
                timeout=time_limit(self.handle),
                use_local_synchronization=True,
            )
        return self._blocks[blocks]

    def __deepcopy__(self, memo: object) -> TPGroup:
        """The same: a copy of a model lives on the same ranks."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a sharded model holds a process group, which cannot be pickled or sent; save "
            "model.state_dict(), which has this rank's shards, or "
            "deepspeed_autotp.full_state_dict(model), which has the whole weights"
        )


def _parted(
    received: Tensor, sizes: Sequence[int], shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The ranks' tensors of a gather in which all were padded to the longest."""
    return [
        row[:size].reshape(shape) for row, size, shape in zip(received, sizes, shapes, strict=True)
    ]


def host_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A group over ``ranks`` (global, this rank among them) that moves host tensors and objects.

    Those ranks call it, and nobody else has to.
    """
    everyone = len(ranks) == dist.get_world_size()
    world = dist.group.WORLD
    # Of NCCL's limit, which is shorter than gloo's, nobody thought of what loads a model.
    limit = time_limit(world) if world is not None and moves_host_tensors(world) else None
    made: dist.ProcessGroup = dist.new_group(
        list(ranks), backend="gloo", timeout=limit, use_local_synchronization=not everyone
    )
    _pause_at_exit()
    return made


def time_limit(handle: dist.ProcessGroup) -> timedelta | None:
    """How long a collective may take; None where the backend does not say."""
    device = torch.device("cpu") if moves_host_tensors(handle) else torch.device("cuda")
    return interop.backend_timeout(handle._get_backend(device))


def moves_host_tensors(handle: dist.ProcessGroup) -> bool:
    """Whether ``handle`` can carry tensors that lie in host memory."""
    return torch.device("cpu") in handle._device_types


@functools.cache
def _pause_at_exit() -> None:
    """Let gloo's threads drop the tensors of the last collectives before Python ends.

    A gloo thread takes the GIL to drop a tensor. One that asks for it after Python has begun
    to end is killed by CPython inside a destructor, which aborts a run that has succeeded.
    DeepSpeed's module globals keep groups past ``destroy_process_group``, so their threads
    cannot be joined; sleeping gives the GIL away.
    """
    atexit.register(time.sleep, _EXIT_PAUSE)
