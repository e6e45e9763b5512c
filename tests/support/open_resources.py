# SPDX-License-Identifier: Apache-2.0
"""What a process has open: threads, sockets, files, shared memory and process groups."""

import gc
import os
from pathlib import Path

import torch.distributed.distributed_c10d as c10d


def mapped_shared_memories(end: str = "") -> int:
    """How many of the package are mapped: lines of ``/proc/self/maps`` that end in ``end``, which
    is " (deleted)" for a file that has no name any more."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum("/dev/shm/autotp-" in line and line.endswith(end) for line in lines)


def open_resources() -> dict[str, int]:
    """How many of each kind this process has, once garbage is collected."""
    gc.collect()
    files = []
    for number in Path("/proc/self/fd").iterdir():
        try:
            files.append(os.readlink(number))
        except FileNotFoundError:  # that of the listing itself
            continue
    return {
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "sockets": sum(name.startswith("socket:") for name in files),
        "files": len(files),
        "shared memories": mapped_shared_memories(),
        "process groups": len(c10d._world.pg_names),
    }
