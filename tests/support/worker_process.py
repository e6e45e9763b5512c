# SPDX-License-Identifier: Apache-2.0
"""One worker of the pool as its parent sees it, and what goes over the channel between them."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

__all__ = ["EXTENSIONS", "Answer", "Failure", "Job", "PoolError", "Template", "Worker"]

ROOT = Path(__file__).resolve().parents[2]
# DeepSpeed compiles some of its operations at first use; built once, they serve later runs.
EXTENSIONS = Path(os.environ.get("AUTOTP_TEST_EXTENSIONS", ROOT / "build" / "torch_extensions"))
# faulthandler writes the stacks from a signal handler; the parent can only wait for it.
DUMP_TIME = 0.5
LOG_LINES = 60


@dataclass(frozen=True, slots=True)
class Job:
    """One call, as a worker gets it. ``arguments`` is pickled apart, so that a worker can report
    arguments that it cannot read."""

    function: str
    arguments: bytes
    rank: int
    ranks: int
    timeout: float
    rendezvous: str
    port: int
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class Failure:
    """What one rank raised; ``at`` is ``time.monotonic()``, which all processes share."""

    at: float
    kind: str
    message: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker sends back: a pickled result, or a failure, and whether to end it."""

    result: bytes
    failure: Failure | None
    worn: bool


class PoolError(Exception):
    """At least one rank raised, died or did not answer.

    ``rank`` is the first that went wrong and ``kind`` the name of the exception type there,
    "died" or "timeout". The message ends with the traceback or the stacks of that rank.
    """

    def __init__(self, message: str, *, rank: int, kind: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.kind = kind


class Template:
    """The process that workers are forked from, and the file that collects what it prints."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._requests, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.worker_template", str(child.fileno())],
                cwd=ROOT,
                env=_environment(),
                pass_fds=[child.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        child.close()

    def fork(self, channel: Connection, report: Connection, log: Path) -> None:
        """Start a worker, which serves at ``channel``; its exit status is sent to ``report``."""
        with log.open("wb") as output:
            socket.send_fds(
                self._requests,
                [pickle.dumps(_environment())],
                [channel.fileno(), report.fileno(), output.fileno()],
            )

    def printed(self) -> str:
        return _last_lines(self._log, 0)

    def close(self) -> None:
        """End the process, whose requests are closed."""
        self._requests.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _environment() -> dict[str, str]:
    return os.environ | {
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
    }


class Worker:
    """One worker process, the channel to it, and the file that collects what it prints."""

    def __init__(self, template: Template, log: Path) -> None:
        self.channel, child = Pipe()
        self._report, report = Pipe(duplex=False)
        with child, report:
            template.fork(child, report, log)
        self._template = template
        self._log = log
        self._pid: int | None = None  # once it is ready
        self.exit_status: int | None = None
        self.job_log_start = 0

    def await_ready(self, deadline: float) -> None:
        if self._pid is not None:
            return
        if not self.channel.poll(max(0.0, deadline - time.monotonic())):
            raise PoolError(f"a worker did not start:\n{self._start()}", rank=-1, kind="timeout")
        try:
            self._pid = self.channel.recv()
        except EOFError:
            raise PoolError(
                f"a worker died at start:\n{self._start()}", rank=-1, kind="died"
            ) from None

    def _start(self) -> str:
        return "\n".join([self._template.printed(), self.printed()])

    def send(self, job: Job) -> None:
        self.job_log_start = self._log.stat().st_size
        self.channel.send_bytes(pickle.dumps(job))

    def printed(self) -> str:
        """The last lines that this worker printed since its job began."""
        return _last_lines(self._log, self.job_log_start)

    def dump_stacks(self) -> None:
        """Have faulthandler print the stacks of all threads, which it does on SIGUSR1."""
        self._signal(signal.SIGUSR1)
        time.sleep(DUMP_TIME)

    def has_ended(self, timeout: float | None = DUMP_TIME) -> bool:
        """Whether the process is gone; its channel closes a moment before it can be waited for."""
        if self.exit_status is None and self._report.poll(timeout):
            try:
                self.exit_status = self._report.recv()
            except EOFError:  # its template is gone, and will not tell
                self.exit_status = -signal.SIGKILL
        return self.exit_status is not None

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self.has_ended(None)
        self.channel.close()
        self._report.close()

    def await_end(self) -> None:
        """Wait for a worker whose channel is closed, which ends it."""
        if not self.has_ended(10):
            self._signal(signal.SIGKILL)
            self.has_ended(None)
        self._report.close()

    def _signal(self, number: int) -> None:
        if self._pid is not None and not self.has_ended(0):
            os.kill(self._pid, number)


def _last_lines(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES:])
