# SPDX-License-Identifier: Apache-2.0
"""A checkpoint for commands that do not come to their end, and one that loses a process."""

import multiprocessing
import os
import signal
import threading
import time

from tests.support.autotp_command import command
from tests.support.engine_config import Setting
from tests.support.resumed_runs import Case, make_engine

LARGE = Case(changes={"hidden_size": 128, "intermediate_size": 512, "vocab_size": 4096})


def save(folder: str) -> None:
    engine = make_engine(LARGE, Setting(tp=2, zero=1, clip=1.0), seed=0)
    engine.save_checkpoint(folder)
    engine.destroy()


def fails_for_want_of_a_process(checkpoint: str, out: str) -> tuple[int, str, list[int | None]]:
    """Status and error of a command of which a process is killed, and the processes left."""

    def kill_one() -> None:
        while not (processes := multiprocessing.active_children()):
            time.sleep(0.01)
        assert processes[0].pid is not None
        os.kill(processes[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    status, _, errors = command("reshard", checkpoint, out, "--tp", "4", "--jobs", "2")
    killer.join()
    return status, errors, [process.pid for process in multiprocessing.active_children()]
