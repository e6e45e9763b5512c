# SPDX-License-Identifier: Apache-2.0
"""Ranks that run code with collectives in it and may fail anywhere between two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from deepspeed_autotp.distributed.process_group import TPGroup

# The place of a rank that has reached the end; no run has this many collectives.
_END = 2**31 - 2


class PeerFailed(RuntimeError):
    """Another rank failed; its own error says why."""


class Strayed(RuntimeError):
    """The ranks are at different collectives. All raise it at once, so nobody has to be told."""


class Lost(RuntimeError):
    """A rank did not come. What tells the others of an error would fail as well."""


@contextmanager
def lockstep(group: TPGroup) -> Iterator[None]:
    """Ahead of every collective each rank says that it is well and where it is.

    A rank that fails says so in the place of its next collective, so that its peers leave
    theirs with PeerFailed instead of waiting for the process group's timeout. Strayed on all
    ranks when they are at different collectives. The code within lets both pass.
    """
    taken = 0

    def say(well: bool, place: int, what: str) -> None:
        flags = [int(well), place, _number_of(what)]
        mine = torch.tensor(flags, dtype=torch.int64, device=group.device)
        said = mine.new_empty(group.size, len(flags))
        try:
            group.gather(mine, into=said)
        except RuntimeError as error:
            raise Lost(
                f"one of the ranks {list(group.global_ranks)} did not come to "
                f"{what or 'a collective'}; it has ended, or has failed and says why: "
                + str(error).partition("\n")[0]
            ) from error
        rows = said.tolist()
        if well and not all(row[0] for row in rows):
            raise PeerFailed("another rank failed")
        if well and any(row != rows[0] for row in rows):
            here = f": rank {group.global_ranks[group.rank]} {what}" if what else ""
            raise Strayed(f"the ranks call different collectives{here}")

    def before(what: str) -> None:
        nonlocal taken
        taken += 1
        say(True, taken, what)

    group.before = before
    try:
        yield
        say(True, _END, "")
    except (PeerFailed, Strayed, Lost):
        raise
    except BaseException:
        with suppress(Lost):  # the error that is told counts
            say(False, taken, "")
        raise
    finally:
        group.before = None


def _number_of(what: str) -> int:
    """A number that is the same for the same words alone; 0 for none."""
    if not what:
        return 0
    return int.from_bytes(hashlib.blake2b(what.encode(), digest_size=7).digest())
