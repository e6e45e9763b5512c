# SPDX-License-Identifier: Apache-2.0
"""All process groups of one sharded model: that of its TP ranks, and what was made beside it."""

from __future__ import annotations

import atexit
import functools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from deepspeed_autotp.distributed.owned_groups import OwnedGroups, supports_cpu_tensors
from deepspeed_autotp.interop.torch_private import backend_timeout

# By rank of a TP group, the lowest rank and the number of ranks that hold the same runs.
Subgroups = tuple[tuple[int, int], ...]

# Seconds that the end of a process waits for gloo's threads.
_EXIT_PAUSE = 0.1


@dataclass(frozen=True, slots=True)
class Handles:
    """A group, and one over the same ranks that takes CPU tensors, and so objects; the same where
    the group takes them itself."""

    own: dist.ProcessGroup
    cpu: dist.ProcessGroup

    def on(self, device: torch.device) -> dist.ProcessGroup:
        """The one that moves tensors that are on ``device``."""
        return self.cpu if device.type == "cpu" else self.own


class ModelGroups:
    """The groups of one sharded model. All ranks make every call, but :meth:`opened` and
    :meth:`subgroup`.

    ``owned`` are those that were made for it, which are closed with it; it may have ``handle``.
    """

    def __init__(self, handle: dist.ProcessGroup, owned: OwnedGroups) -> None:
        self._process = os.getpid()
        self._rank = dist.get_rank(handle)
        self._ranks = dist.get_process_group_ranks(handle)
        self._owned = owned
        self._subgroups: dict[Subgroups, Handles | None] = {}
        self._handles: Handles | None = None
        self.open(handle)

    @property
    def is_closed(self) -> bool:
        """Whether there are none, after :meth:`close`."""
        return self._handles is None

    def open(self, handle: dist.ProcessGroup) -> None:
        """Make the groups around ``handle``, after :meth:`close` those that there were."""
        pause_at_exit()
        cpu = handle
        if not supports_cpu_tensors(handle):
            timeout = _object_timeout()
            cpu = self._owned.make(handle, self._ranks, backend="gloo", timeout=timeout)
        self._handles = Handles(handle, cpu)
        self.open_subgroups(list(self._subgroups))

    def close(self) -> None:
        """Close what is owned; asking for a group later is an error."""
        self._handles = None
        self._subgroups = dict.fromkeys(self._subgroups)
        self._owned.close()

    def opened(self) -> Handles:
        """The group of the model. RuntimeError after :meth:`close`, and in a fork of the process:
        both would write to the same sockets."""
        if not torch.compiler.is_compiling() and os.getpid() != self._process:
            raise RuntimeError(
                f"process {os.getpid()} is a fork of process {self._process}, which is rank "
                f"{self._rank} of the group: two processes of a rank would mix up its "
                "collectives; call the model in the process that sharded it"
            )
        if self._handles is None:
            raise RuntimeError(
                "the process groups of this sharded model were closed, by destroy or as it was "
                "not sharded to the end, expected open ones; run and save the model before destroy"
            )
        return self._handles

    def open_subgroups(self, wanted: Sequence[Subgroups]) -> None:
        """Make groups of the ranks that hold the same runs, unless they were made."""
        handles = self.opened()
        for subgroups in wanted:
            is_trivial = all(count in (1, len(subgroups)) for _, count in subgroups)
            if is_trivial or self._subgroups.get(subgroups) is not None:
                continue
            lowest, count = subgroups[self._rank]
            ranks = self._ranks[lowest : lowest + count]
            own = self._make_subgroup(handles.own, ranks)
            cpu = own if handles.cpu is handles.own else self._make_subgroup(handles.cpu, ranks)
            self._subgroups[subgroups] = Handles(own, cpu)

    def subgroup(self, subgroups: Subgroups) -> Handles:
        """The group of the ranks that hold the same runs as this one, of which there are more.

        RuntimeError after :meth:`close`.
        """
        handles = self.opened()
        _, count = subgroups[self._rank]
        found = handles if count == len(subgroups) else self._subgroups[subgroups]
        assert found is not None
        return found

    def _make_subgroup(self, parent: dist.ProcessGroup, ranks: Sequence[int]) -> dist.ProcessGroup:
        backend, timeout = dist.get_backend(parent), group_timeout(parent)
        return self._owned.make(parent, ranks, backend=backend, timeout=timeout)


def world_cpu_group(owned: OwnedGroups) -> dist.ProcessGroup:
    """A group of all ranks that takes CPU tensors, and so objects; made where the default group
    does not. All ranks call it."""
    world = dist.group.WORLD
    assert world is not None
    if supports_cpu_tensors(world):
        return world
    pause_at_exit()
    everyone = range(dist.get_world_size())
    return owned.make(world, everyone, backend="gloo", timeout=_object_timeout())


def _object_timeout() -> timedelta | None:
    """NCCL's default timeout is shorter than gloo's, and not meant for loading a model."""
    world = dist.group.WORLD
    return group_timeout(world) if world is not None and supports_cpu_tensors(world) else None


def group_timeout(handle: dist.ProcessGroup) -> timedelta | None:
    """The timeout of collectives; None where the backend does not say."""
    device = torch.device("cpu") if supports_cpu_tensors(handle) else torch.device("cuda")
    return backend_timeout(handle, device)


@functools.cache
def pause_at_exit() -> None:
    """Let gloo's threads release the tensors of the last collectives before Python finalizes.

    A gloo thread takes the GIL to release a tensor. One that asks for it after finalization has
    begun is killed by CPython inside a destructor, which aborts a run that has succeeded.
    DeepSpeed's module globals keep groups past ``destroy_process_group``, so their threads
    cannot be joined; sleeping releases the GIL.
    """
    atexit.register(time.sleep, _EXIT_PAUSE)
