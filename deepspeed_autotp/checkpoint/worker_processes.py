# SPDX-License-Identifier: Apache-2.0
"""Items of work over several processes. After an error or Ctrl-C none of them is left, nor after
this process was killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

import torch

from deepspeed_autotp.distributed.local_processes import end_with_parent

T = TypeVar("T")

# Is told how much more is done.
Advance = Callable[[int], object]
# Does one item.
Work = Callable[[T, Advance], None]


class Progress(Protocol):
    """Shows within the block how much of ``total`` is done, which is counted in ``unit``."""

    def __call__(self, total: int, title: str, unit: str) -> AbstractContextManager[Advance]: ...


# Starting a process takes seconds; less than this is done faster without.
_WORTH_A_PROCESS = 2 * 10**9


def default_jobs(nbytes: int) -> int:
    """Processes that are worth it for so many bytes on this machine."""
    return max(1, min(len(os.sched_getaffinity(0)), nbytes // _WORTH_A_PROCESS))


def do_all(start: Callable[[], Work[T]], items: Sequence[T], *, jobs: int, done: Advance) -> None:
    """Do all items in at most ``jobs`` processes, each of which calls ``start`` once. ``done`` is
    told of all.

    ``start`` and the items can be pickled. An error is that of one item; ChildProcessError where a
    process was ended from outside.
    """
    count = min(jobs, len(items))
    if count <= 1:
        work = start()
        for item in items:
            work(item, done)
        return
    left = iter(items)
    with _workers(start, count) as workers:
        for pipe in workers:
            _give(pipe, [next(left)])
        busy = list(workers)
        while busy:
            ready = wait(busy)
            for pipe in [pipe for pipe in busy if pipe in ready]:
                told = _told(pipe, workers[pipe])
                if told is not None:
                    done(told)
                    continue
                following = list(islice(left, 1))  # none tells it to end
                _give(pipe, following)
                if not following:
                    busy.remove(pipe)


def _give(pipe: Connection, items: list[Any]) -> None:
    with suppress(BrokenPipeError):  # why it has ended is what comes from it next
        pipe.send(items)


def _told(pipe: Connection, worker: BaseProcess) -> int | None:
    """How much was done, or None where an item was; raises what the worker has raised."""
    try:
        told = pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.join()
        raise ChildProcessError(
            f"a process ended with the exit code {worker.exitcode}, expected 0; it may have been "
            "killed for want of memory: try fewer --jobs"
        ) from None
    if isinstance(told, Exception):
        raise told
    assert told is None or isinstance(told, int)
    return told


@contextmanager
def _workers(start: Callable[[], Work[Any]], count: int) -> Iterator[dict[Connection, BaseProcess]]:
    """Processes by the pipes to them; killed where the block is left by an error."""
    workers: dict[Connection, BaseProcess] = {}
    try:
        _add_workers(workers, start, count)
        yield workers
    except BaseException:
        for worker in workers.values():
            worker.kill()
        raise
    finally:
        for pipe, worker in workers.items():
            worker.join()
            pipe.close()


def _add_workers(
    workers: dict[Connection, BaseProcess], start: Callable[[], Work[Any]], count: int
) -> None:
    # A fork would have locks of threads that it has not.
    context = multiprocessing.get_context("spawn")
    # Ctrl-C is for this process, which ends the others.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(count):
            here, there = context.Pipe()
            worker = context.Process(target=_serve, args=(start, there))
            worker.start()
            there.close()
            workers[here] = worker
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(start: Callable[[], Work[Any]], pipe: Connection) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        work = start()
        while item := pipe.recv():
            work(item[0], pipe.send)
            pipe.send(None)
    except (ValueError, OSError) as error:  # by its message: not every error can be pickled
        kind = OSError if isinstance(error, OSError) else ValueError
        pipe.send(kind(str(error)))
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))
