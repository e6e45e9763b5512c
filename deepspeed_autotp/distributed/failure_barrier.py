# SPDX-License-Identifier: Apache-2.0
"""A barrier before every collective, so that ranks whose code may fail between two of them all
leave with an error instead of waiting for the process group's timeout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from deepspeed_autotp.distributed.lost_ranks import reason_of
from deepspeed_autotp.distributed.process_group import TPGroup

_CPU = torch.device("cpu")
# The position of a rank that has reached the end; no run has this many collectives.
_END = 2**31 - 2


class PeerFailed(RuntimeError):
    """Another rank failed; its own error says why."""


class CollectiveMismatch(RuntimeError):
    """The ranks are at different collectives. Raised on all of them at once."""


class PeerLost(RuntimeError):
    """A rank did not reach the barrier. A message to the others would fail as well."""


@contextmanager
def failure_barrier(group: TPGroup) -> Iterator[None]:
    """Before every collective of ``group`` the ranks exchange their status and position.

    A rank that raises reports so at its next barrier, and its peers leave theirs with PeerFailed.
    CollectiveMismatch on all ranks when they are at different collectives. The code within lets
    both pass.
    """
    position = 0

    def exchange_status(ok: bool, position: int, what: str) -> None:
        status = [int(ok), position, _digest(what)]
        mine = torch.tensor(status, dtype=torch.int64, device=_CPU)
        gathered = mine.new_empty(group.size, len(status))
        try:
            # A rank that has failed in its backward is out of it by now.
            group.all_gather_into(mine, into=gathered, of_any_pass=True)
        except RuntimeError as error:
            raise PeerLost(
                f"one of the ranks {list(group.global_ranks)} did not reach "
                f"{what or 'a collective'}; it has ended, or has failed and its own error says "
                f"why: {reason_of(error)}"
            ) from error
        rows = gathered.tolist()
        if ok and not all(row[0] for row in rows):
            raise PeerFailed("another rank failed")
        if ok and any(row != rows[0] for row in rows):
            raise CollectiveMismatch(_mismatch(group, what))

    def before_collective(what: str) -> None:
        nonlocal position
        position += 1
        exchange_status(True, position, what)

    group.before_collective = before_collective
    try:
        yield
        exchange_status(True, _END, "")
    except (PeerFailed, CollectiveMismatch, PeerLost):
        raise
    except BaseException:
        with suppress(PeerLost):  # the error of this rank is the one to raise
            exchange_status(False, position, "")
        raise
    finally:
        group.before_collective = None


def _digest(text: str) -> int:
    """An integer that is equal for equal texts only; 0 for the empty one."""
    if not text:
        return 0
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def _mismatch(group: TPGroup, what: str) -> str:
    here = f": rank {group.global_ranks[group.rank]} is at {what}" if what else ""
    return (
        f"mismatch between collectives on the ranks{here}; make the same calls on every rank, in "
        "the same order"
    )
