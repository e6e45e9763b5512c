# SPDX-License-Identifier: Apache-2.0
"""One function on several ranks of this machine, which talk over gloo.

The ranks are forks of a process that has imported what they need and has done nothing else: the
imports of torch and transformers take seconds, which each rank would spend again. Whatever happens,
an error, a timeout, Ctrl-C or the end of this process, none of them is left.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# How long the other ranks have to answer once one has failed: which of them failed first is then
# known, and the others wait for it in vain.
_GRACE = 3.0


class RankError(Exception):
    """A rank raised, ended or did not answer; ``details`` is its traceback, where there is one."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


@dataclass(frozen=True, slots=True)
class _Failure:
    """``at`` is ``time.monotonic()``, which all processes share."""

    at: float
    text: str
    details: str


def preload(modules: Sequence[str]) -> None:
    """Begin to import ``modules`` for the ranks to come, and return at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    with suppress(ImportError):
        from multiprocessing.forkserver import ensure_running

        ensure_running()


def run_on_ranks(
    function: Callable[..., Any],
    *arguments: Any,
    ranks: int,
    timeout: float,
    told: Callable[[Any], object] = lambda _: None,
) -> list[Any]:
    """``function(tell, *arguments)`` on each of ``ranks`` ranks with a default process group; what
    they return, by rank.

    Function, arguments and results can be pickled. What a rank calls ``tell`` with, ``told`` is
    given here. RankError where a rank fails, or has not answered after ``timeout`` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory(prefix="autotp-ranks-") as folder:
        meeting = str(Path(folder, "rendezvous"))
        processes: dict[Connection, BaseProcess] = {}
        deadline = time.monotonic() + timeout
        try:
            for rank in range(ranks):
                job = (function, arguments, rank, ranks, meeting, timeout)
                pipe, process = _started(context, job)
                processes[pipe] = process
            return _Answers(processes, deadline, timeout, told).collect()
        finally:
            for pipe, process in processes.items():
                process.kill()
                process.join()
                pipe.close()


def _started(context: ForkServerContext, job: tuple[Any, ...]) -> tuple[Connection, BaseProcess]:
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(*job, there))
    process.start()
    there.close()
    return here, process


class _Answers:
    """What the ranks send: told values, and at the end a result or a failure."""

    def __init__(
        self,
        processes: dict[Connection, BaseProcess],
        deadline: float,
        timeout: float,
        told: Callable[[Any], object],
    ) -> None:
        self._pipes = list(processes)
        self._processes = processes
        self._deadline = deadline
        self._timeout = timeout
        self._told = told
        self._results: dict[int, Any] = {}
        self._failures: dict[int, _Failure] = {}

    def collect(self) -> list[Any]:
        while len(self._results) + len(self._failures) < len(self._pipes):
            left = self._deadline - time.monotonic()
            ready = wait(self._silent(), max(0.0, left)) if left > 0 else []
            if not ready and self._failures:
                break
            if not ready:
                ranks = ", ".join(str(self._pipes.index(each)) for each in self._silent())
                raise RankError(f"rank {ranks} did not answer within {self._timeout:g} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                self._read(pipe)
        if self._failures:
            rank, first = min(self._failures.items(), key=lambda each: each[1].at)
            raise RankError(f"rank {rank} failed: {first.text}", first.details)
        return [self._results[rank] for rank in range(len(self._pipes))]

    def _silent(self) -> list[Connection]:
        return [
            pipe
            for rank, pipe in enumerate(self._pipes)
            if rank not in self._results and rank not in self._failures
        ]

    def _read(self, pipe: Connection) -> None:
        rank = self._pipes.index(pipe)
        try:
            kind, value = pipe.recv()
        except (EOFError, ConnectionResetError):
            process = self._processes[pipe]
            process.join()
            # The others fail because of it, and may be read before.
            kind, value = "failure", _Failure(0.0, _ended(process.exitcode), "")
        if kind == "told":
            self._told(value)
        elif kind == "result":
            self._results[rank] = value
        else:
            if not self._failures:
                self._deadline = min(self._deadline, time.monotonic() + _GRACE)
            self._failures[rank] = value


def _ended(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "it was killed, maybe for want of memory"
    return f"it ended with the exit code {code}"


def _serve(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    ranks: int,
    meeting: str,
    timeout: float,
    pipe: Connection,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name need not lead to this machine
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(meeting, ranks),  # type: ignore[attr-defined]
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout),
        )
        result = function(lambda value: pipe.send(("told", value)), *arguments)
        pipe.send(("result", result))
        dist.barrier()  # or a rank that is done would close the sockets of the others
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        pipe.send(("failure", _Failure(time.monotonic(), text, traceback.format_exc())))


def end_with_parent() -> None:
    """Wait for the process that has started this one to end, and end this one then."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
