# SPDX-License-Identifier: Apache-2.0
"""Many ranks on a small machine: forks of one process, which share what it has imported.

For a process of one's own that has neither started threads nor run a backward pass; forks of
others may hang.
"""

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A rank that waits for one that failed ends by itself before the parent gives up.
_MARGIN = 10.0


def run(function: Callable[[], Any], *, ranks: int, timeout: float = 60.0) -> list[Any]:
    """What ``function`` gives on each rank of a fresh gloo group; RuntimeError where one fails."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="autotp-forked-") as folder:
        meeting = str(Path(folder, "rendezvous"))
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            context.Process(
                target=_serve, args=(function, rank, ranks, meeting, timeout, pipes[rank][1])
            )
            for rank in range(ranks)
        ]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + timeout
            return [_result(pipe, rank, deadline) for rank, (pipe, _) in enumerate(pipes)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _result(pipe: Connection, rank: int, deadline: float) -> Any:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        raise RuntimeError(f"rank {rank} did not answer")
    result, error = pipe.recv()
    if error:
        raise RuntimeError(f"rank {rank} failed:\n{error}")
    return result


def _serve(
    function: Callable[[], Any],
    rank: int,
    ranks: int,
    meeting: str,
    timeout: float,
    pipe: Connection,
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(meeting, ranks),  # type: ignore[attr-defined]
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout - _MARGIN),
        )
        pipe.send((function(), ""))
        dist.barrier()  # or a rank that is done would close the sockets of the others
    except BaseException:
        pipe.send((None, traceback.format_exc()))
