# SPDX-License-Identifier: Apache-2.0
"""The process groups that were made for one sharded model, and their end.

torch.distributed keeps a group until it is destroyed, also one out of use, and ranks that have
destroyed different groups no longer agree about names of later ones. So groups are closed only
where all ranks are at the same point: in ``destroy``, after an error, and, for models that were
merely dropped, where all ranks shard the next one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from deepspeed_autotp.interop.torch_private import (
    default_store,
    device_types,
    is_registered,
    new_named_group,
)

# Groups whose owner was garbage-collected, by name, and all owners. torch keeps the groups alive.
_dropped: weakref.WeakValueDictionary[str, dist.ProcessGroup] = weakref.WeakValueDictionary()
_owners: weakref.WeakSet[OwnedGroups] = weakref.WeakSet()


class OwnedGroups:
    """Makes process groups and closes them; those of users or DeepSpeed are not among them."""

    def __init__(self) -> None:
        self._handles: list[dist.ProcessGroup] = []
        weakref.finalize(self, _drop, self._handles).atexit = False
        _owners.add(self)

    def make(
        self,
        parent: dist.ProcessGroup,
        ranks: Sequence[int],
        *,
        backend: str,
        timeout: timedelta | None,
    ) -> dist.ProcessGroup:
        """A group of ``ranks`` (global, this one among them). All ranks of ``parent`` make the
        same calls, each for its own ranks."""
        # The store counts: unlike a counter here it is as old as the names that it makes.
        calls = default_store().add(f"autotp/{parent.group_name}/{dist.get_rank()}", 1)
        name = f"autotp/{parent.group_name}/{calls}/{ranks[0]}"
        return self.adopt(new_named_group(ranks, name=name, backend=backend, timeout=timeout))

    def adopt(self, handle: dist.ProcessGroup) -> dist.ProcessGroup:
        """Own a group that was made elsewhere."""
        self._handles.append(handle)
        return handle

    def names(self) -> list[str]:
        """Of the groups that are open; names of a run that was ended are given again."""
        return [handle.group_name for handle in self._handles if is_registered(handle)]

    def close(self) -> None:
        """Destroy the groups. All their ranks call it, before they make another one."""
        while self._handles:
            handle = self._handles.pop()
            if is_registered(handle):
                dist.destroy_process_group(handle)


def groups_in_use() -> list[str]:
    """The names of all groups that models of this process still have."""
    return [name for owner in _owners for name in owner.names()]


def close_dropped(in_use: Sequence[str], ranks: Sequence[int]) -> None:
    """Close the groups of models that are gone, but those that models of other ranks have.

    All of ``ranks`` call it with what :func:`groups_in_use` said on any of them.
    """
    for name, handle in sorted(_dropped.items()):
        if not is_registered(handle):
            del _dropped[name]
        elif name not in in_use and set(dist.get_process_group_ranks(handle)) <= set(ranks):
            del _dropped[name]
            dist.destroy_process_group(handle)


def supports_cpu_tensors(handle: dist.ProcessGroup) -> bool:
    """Whether collectives of ``handle`` take CPU tensors."""
    return any(device.type == "cpu" for device in device_types(handle))


def _drop(handles: Sequence[dist.ProcessGroup]) -> None:
    _dropped.update({handle.group_name: handle for handle in handles if is_registered(handle)})
