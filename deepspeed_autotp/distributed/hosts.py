# SPDX-License-Identifier: Apache-2.0
"""Which host a rank is on, known without a message to another rank.

A host is where ranks can share memory: one kernel, and one ``/dev/shm``. Two containers of one
machine are two hosts unless they have that in common, whatever their host names are. NCCL compares
the same before it uses shared memory (``shmDev`` of its ``ncclPeerInfo``).
"""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass, field
from pathlib import Path

_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Host:
    """``name`` is for people; hosts are equal where their ``identity`` is."""

    name: str = field(compare=False)
    identity: int

    def __str__(self) -> str:
        return self.name


def this_host() -> Host:
    """The host of this process."""
    name = socket.gethostname()
    seen = folder_identity(_MEMORY) or name  # without the folder no ranks share memory
    digest = hashlib.blake2b(seen.encode(), digest_size=7).digest()
    return Host(name, int.from_bytes(digest))


def folder_identity(folder: Path) -> str | None:
    """What is the same for processes that see ``folder`` on one machine; None where they do not see
    it, or their machine has no name for its kernel."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        found = folder.stat()
    except OSError:
        return None
    return f"{kernel.strip()} {found.st_dev} {found.st_ino}"
