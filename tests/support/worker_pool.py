# SPDX-License-Identifier: Apache-2.0
"""One pool of worker processes for every distributed test of a run.

A worker is forked from a template, which has imported torch, transformers and DeepSpeed, and
serves one test after the other. ``Pool.run`` gives its ranks a fresh gloo group, calls one
function on each of them and returns what they returned. A rank that raises, dies or does not
answer makes ``run`` raise, so the failure carries the name of the test that asked.
"""

import pickle
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.support.worker_process import (
    EXTENSIONS,
    Answer,
    Failure,
    Job,
    PoolError,
    Template,
    Worker,
)

__all__ = ["SIZE", "Pool", "PoolError"]

SIZE = 4
START_TIMEOUT = 180.0
# How long the other ranks get to answer once one has raised: its group is gone by then, which
# ends a gloo collective within milliseconds.
GRACE = 10.0


class Pool:
    """Up to ``SIZE`` workers; each starts when a test first needs its rank."""

    def __init__(self, size: int = SIZE) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="autotp-pool-")
        self._templates: list[Template | None] = [None, None]
        self._workers: list[Worker | None] = [None] * size
        self._runs = 0

    def run(
        self,
        function: Callable[..., Any] | str,
        *args: Any,
        ranks: int = 2,
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """Call ``function(*args)`` on ``ranks`` ranks and return the results by rank.

        ``function`` is a top-level function of an importable module, or "module:function".
        Arguments and results are pickled; a tensor arrives as a copy. The default process group
        is initialised, spans exactly these ranks and is destroyed afterwards; every environment
        variable, DeepSpeed's and Accelerate's state and the random seeds start fresh. ``env``
        holds variables for this call. Raises PoolError.
        """
        if not 1 <= ranks <= len(self._workers):
            raise ValueError(f"ranks is {ranks}; the pool has 1 to {len(self._workers)}")
        path = _path_of(function)
        workers = self._need(ranks)
        self._runs += 1
        arguments = pickle.dumps(args)
        rendezvous = str(Path(self._folder.name, f"rendezvous-{self._runs}"))
        port = _free_port()
        began = time.time()
        for rank, worker in enumerate(workers):
            job = Job(path, arguments, rank, ranks, timeout, rendezvous, port, dict(env or {}))
            worker.send(job)
        try:
            answers, late = self._collect(workers, timeout)
        except BaseException:  # as of a test whose time is up: answers would be the next job's
            self._kill(range(ranks))
            raise
        missing = [rank for rank in range(ranks) if rank not in answers]
        if missing:
            return self._fail_missing(workers, answers, missing, path, late, began)
        self._kill(rank for rank in range(ranks) if answers[rank].worn)
        failures = {rank: answers[rank].failure for rank in range(ranks)}
        _raise_first({rank: f for rank, f in failures.items() if f is not None}, path)
        return [pickle.loads(answers[rank].result) for rank in range(ranks)]

    def close(self) -> None:
        running = [worker for worker in self._workers if worker is not None]
        for worker in running:
            worker.channel.close()
        for worker in running:
            worker.await_end()
        self._workers = [None] * len(self._workers)
        for template in self._templates:
            if template is not None:
                template.close()
        self._templates = [None, None]
        self._folder.cleanup()

    def _need(self, ranks: int) -> list[Worker]:
        """The first ``ranks`` workers, started together where they do not run yet."""
        deadline = time.monotonic() + START_TIMEOUT
        workers = []
        for rank in range(ranks):
            worker = self._workers[rank]
            if worker is None or worker.has_ended(0):
                log = Path(self._folder.name, f"worker-{rank}.log")
                worker = self._workers[rank] = Worker(self._template(rank), log)
            workers.append(worker)
        for worker in workers:
            worker.await_ready(deadline)
        return workers

    def _template(self, rank: int) -> Template:
        """What the worker of a rank is forked from.

        There are two, since the order of a set of strings, which a fork has from its template,
        must not be the same on all ranks: on ranks that are launched it is not. Ranks 0 and 3 have
        the first and ranks 1 and 2 the second, so that the ranks of every pair differ.
        """
        index = rank.bit_count() % 2
        template = self._templates[index]
        if template is None:
            log = Path(self._folder.name, f"template-{index}.log")
            template = self._templates[index] = Template(log)
        return template

    def _kill(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            worker, self._workers[rank] = self._workers[rank], None
            if worker is not None:
                worker.kill()

    def _collect(
        self, workers: Sequence[Worker], timeout: float
    ) -> tuple[dict[int, Answer], float]:
        """Answers by rank until all are there, time is up, or a failure's grace is over.

        Returns them and how long was waited. A worker that died has no answer.
        """
        began = time.monotonic()
        deadline = began + timeout
        open_ranks: dict[Connection, int] = {w.channel: r for r, w in enumerate(workers)}
        answers: dict[int, Answer] = {}
        while open_ranks and time.monotonic() < deadline:
            for ready in wait(list(open_ranks), deadline - time.monotonic()):
                assert isinstance(ready, Connection)
                rank = open_ranks.pop(ready)
                try:
                    answers[rank] = pickle.loads(ready.recv_bytes())
                except (EOFError, ConnectionResetError):
                    deadline = min(deadline, time.monotonic() + GRACE)
                    continue
                if answers[rank].failure is not None:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers, time.monotonic() - began

    def _fail_missing(
        self,
        workers: Sequence[Worker],
        answers: Mapping[int, Answer],
        missing: Sequence[int],
        path: str,
        waited: float,
        began: float,
    ) -> list[Any]:
        """Describe the ranks without an answer, end their workers and raise.

        A rank that raised or died explains why its peers did not answer, so it comes first.
        """
        dead = [rank for rank in missing if workers[rank].has_ended()]
        silent = [rank for rank in missing if rank not in dead]
        reports = [_death(rank, workers[rank], path) for rank in dead]
        for rank in silent:
            headline = f"rank {rank} did not answer within {waited:.0f} s while running {path}"
            workers[rank].dump_stacks()
            reports.append(f"{headline}\n{workers[rank].printed()}")
        self._kill(missing)
        _drop_locks(began)
        failed = {r: a.failure for r, a in answers.items() if a.failure is not None}
        if failed and not dead:
            _raise_first(failed, path, reports)
        kind = "died" if dead else "timeout"
        first = (dead or silent)[0]
        others = [_failure_line(rank, failure) for rank, failure in sorted(failed.items())]
        raise PoolError("\n\n".join([*reports, *others]), rank=first, kind=kind)


def _path_of(function: Callable[..., Any] | str) -> str:
    if isinstance(function, str):
        return function
    module, name = function.__module__, function.__qualname__
    if "." in name or module == "__main__":
        raise ValueError(f"{module}.{name} is not a top-level function of an importable module")
    return f"{module}:{name}"


def _free_port() -> int:
    """A port for MASTER_PORT. The group itself meets through a file, so that a port that somebody
    uses in between matters only to a function that starts a second rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _drop_locks(began: float) -> None:
    """Remove the build locks that killed workers leave behind; a later build would wait for
    them forever. ``began`` is ``time.time()`` when the job started."""
    for lock in EXTENSIONS.glob("**/lock"):
        if lock.stat().st_mtime >= began:
            lock.unlink(missing_ok=True)


def _death(rank: int, worker: Worker, path: str) -> str:
    code = worker.exit_status
    assert code is not None
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return f"rank {rank} died with {how} while running {path}\n{worker.printed()}"


def _failure_line(rank: int, failure: Failure) -> str:
    return f"rank {rank} raised {failure.kind}: {failure.message}"


def _raise_first(failures: Mapping[int, Failure], path: str, more: Sequence[str] = ()) -> None:
    """Raise for the rank that failed first: what the others report usually follows from it."""
    if not failures:
        return
    first, *rest = sorted(failures, key=lambda rank: failures[rank].at)
    head = f"{_failure_line(first, failures[first])}\n(in {path})"
    lines = [_failure_line(rank, failures[rank]) for rank in rest]
    text = "\n\n".join([head, failures[first].traceback.rstrip(), *lines, *more])
    raise PoolError(text, rank=first, kind=failures[first].kind)
