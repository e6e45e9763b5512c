# SPDX-License-Identifier: Apache-2.0
"""Ranks that run code with collectives in it and may fail anywhere between two of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from deepspeed_autotp.group import TPGroup

# The place of a rank that has reached the end; no run has this many collectives.
_END = 2**31 - 2


class PeerFailed(RuntimeError):
    """Another rank failed; its own error says why."""


class Strayed(RuntimeError):
    """The ranks are at different collectives. All raise it at once, so nobody has to be told."""


@contextmanager
def lockstep(group: TPGroup) -> Iterator[None]:
    """Ahead of every collective each rank says that it is well and where it is.

    A rank that fails says so in the place of its next collective, so that its peers leave
    theirs with PeerFailed instead of waiting for the process group's timeout. Strayed on all
    ranks when they are at different collectives. The code within lets both pass.
    """
    taken = 0

    def say(well: bool, place: int) -> None:
        flags = torch.tensor([int(well), place, -place], dtype=torch.int64, device=group.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MIN, group=group.handle)
        all_well, first, last = flags.tolist()
        if well and not all_well:
            raise PeerFailed("another rank failed")
        if well and first != -last:
            raise Strayed("the ranks call different collectives")

    def before() -> None:
        nonlocal taken
        taken += 1
        say(True, taken)

    group.before = before
    try:
        yield
        say(True, _END)
    except (PeerFailed, Strayed):
        raise
    except BaseException:
        say(False, taken)
        raise
    finally:
        group.before = None
