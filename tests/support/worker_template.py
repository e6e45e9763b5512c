# SPDX-License-Identifier: Apache-2.0
"""What workers are forked from: ``python -m tests.support.worker_template <file descriptor>``.

It has imported what a worker needs, which takes seconds, and has no thread that a fork would be
without. For each request it forks a worker, and it reports how that ended.
"""

import os
import pickle
import socket
import sys
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from tests.support import worker

MESSAGE_BYTES = 1 << 20


def main() -> None:
    worker.import_all()
    channel = _fork_until_the_parent_ends(socket.socket(fileno=int(sys.argv[1])))
    if channel is not None:
        worker.serve(channel)


def _fork_until_the_parent_ends(requests: socket.socket) -> Connection | None:
    """The channel of a worker, in that worker; nothing, in this process."""
    reports: dict[int, tuple[int, Connection]] = {}  # process id and report, by descriptor
    while True:
        for ready in wait([requests, *reports]):
            if ready is not requests:
                pid, report = reports.pop(int(ready))
                os.close(int(ready))
                _, status = os.waitpid(pid, 0)
                with suppress(BrokenPipeError), report:
                    report.send(os.waitstatus_to_exitcode(status))
                continue
            message, descriptors, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 3)
            if not message:
                return None
            channel, report, log = descriptors
            pid = os.fork()
            if pid == 0:
                _close(requests, reports)
                os.close(report)
                return _become_worker(pickle.loads(message), channel, log)
            os.close(channel)
            os.close(log)
            reports[os.pidfd_open(pid)] = pid, Connection(report, readable=False)


def _close(requests: socket.socket, reports: dict[int, tuple[int, Connection]]) -> None:
    """What a worker has of its template, and of other workers."""
    requests.close()
    for descriptor, (_, report) in reports.items():
        os.close(descriptor)
        report.close()


def _become_worker(environment: dict[str, str], channel: int, log: int) -> Connection:
    os.environ.clear()
    os.environ.update(environment)
    for output in (1, 2):
        os.dup2(log, output)
    os.close(log)
    return Connection(channel)


if __name__ == "__main__":
    main()
