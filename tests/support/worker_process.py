# SPDX-License-Identifier: Apache-2.0
"""One worker of the pool as its parent sees it, and what goes over the channel between them."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path

__all__ = ["EXTENSIONS", "Answer", "Failure", "Job", "PoolError", "Worker"]

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


class Worker:
    """One worker process, the channel to it, and the file that collects what it prints."""

    def __init__(self, number: int, folder: Path) -> None:
        self.log = folder / f"worker-{number}.log"
        self.channel, child = Pipe()
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.worker", str(child.fileno())],
                cwd=ROOT,
                env=environment,
                pass_fds=[child.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        child.close()
        self.ready = False
        self.job_log_start = 0

    def await_ready(self, deadline: float) -> None:
        if self.ready:
            return
        if not self.channel.poll(max(0.0, deadline - time.monotonic())):
            raise PoolError(f"a worker did not start:\n{self.printed()}", rank=-1, kind="timeout")
        try:
            self.channel.recv_bytes()
        except EOFError:
            raise PoolError(
                f"a worker died at start:\n{self.printed()}", rank=-1, kind="died"
            ) from None
        self.ready = True

    def send(self, job: Job) -> None:
        self.job_log_start = self.log.stat().st_size
        self.channel.send_bytes(pickle.dumps(job))

    def printed(self) -> str:
        """The last lines that this worker printed since its job began."""
        with self.log.open("rb") as log:
            log.seek(self.job_log_start)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-LOG_LINES:])

    def dump_stacks(self) -> None:
        """Have faulthandler print the stacks of all threads, which it does on SIGUSR1."""
        self.process.send_signal(signal.SIGUSR1)
        time.sleep(DUMP_TIME)

    def has_ended(self) -> bool:
        """Whether the process is gone; its channel closes a moment before it can be waited for."""
        try:
            self.process.wait(timeout=DUMP_TIME)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.channel.close()

    def await_end(self) -> None:
        """Wait for a worker whose channel is closed: it leaves by itself."""
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
