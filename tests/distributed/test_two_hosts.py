# SPDX-License-Identifier: Apache-2.0
"""Ranks on two hosts train as one process does, and end with an error where a host is gone.

The hosts are namespaces of this machine: tests/support/two_hosts.py.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from benchmarks.step_calls import GLOO, SHARED_MEMORY
from tests.support.two_hosts import Host, NoHosts, two_hosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MODULE = "tests.distributed.two_hosts_ranks"
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
# What a collective waits for in a test that loses a host, in seconds.
TIMEOUT = 8.0


class Runs:
    """The processes of a test, and what they print and find."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._processes: dict[str, Popen[str]] = {}

    def torchrun(self, hosts: Sequence[Host], case: str, ranks: int = 2) -> None:
        """As a user starts a run, once on each host."""
        for node, host in enumerate(hosts):
            options = [f"--nnodes={len(hosts)}", f"--nproc-per-node={ranks}", f"--node-rank={node}"]
            meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0].address}:29500"]
            run = ["-m", "torch.distributed.run", *options, *meeting, "-m", MODULE]
            self._start(f"node {node}", host, [*run, case, str(self.folder)], {})

    def rank(
        self, rank: int, host: Host, case: str, *, env: Mapping[str, str], by: Sequence[str] = ()
    ) -> None:
        """One of four ranks, as srun starts it; ``by`` is a command before its own."""
        more = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "29500"}
        command = ["-m", MODULE, case, str(self.folder)]
        self._start(f"rank {rank}", host, command, {**more, **env}, by=by)

    def _start(
        self,
        name: str,
        host: Host,
        arguments: Sequence[str],
        env: Mapping[str, str],
        by: Sequence[str] = (),
    ) -> None:
        output = self._stack.enter_context((self.folder / f"{name}.log").open("w"))
        environment = {**ENVIRONMENT, **env}
        started = host.python(*arguments, env=environment, output=output, by=by)
        self._processes[name] = started

    def wait(self, seconds: float, *, expected: int | None = 0) -> dict[str, int]:
        """The exit codes of all processes."""
        deadline = time.monotonic() + seconds
        codes = {}
        for name, process in self._processes.items():
            codes[name] = process.wait(timeout=max(0.1, deadline - time.monotonic()))
            if expected is not None:
                assert codes[name] == expected, self.log(name)
        return codes

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def found(self) -> list[Any]:
        """What the ranks found, by rank."""
        return [json.loads((self.folder / f"{rank}.json").read_text()) for rank in range(4)]

    def after_step(self, step: int, seconds: float = 120.0) -> None:
        """Wait until every rank has done ``step``."""
        deadline = time.monotonic() + seconds
        files = [self.folder / f"{rank}.step" for rank in range(4)]
        while not all(file.exists() and int(file.read_text() or -1) >= step for file in files):
            assert time.monotonic() < deadline, "\n".join(map(self.log, self._processes))
            time.sleep(0.05)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def hosts(tmp_path: Path, stack: ExitStack) -> list[Host]:
    return made(stack, tmp_path)


@pytest.fixture
def runs(tmp_path: Path, stack: ExitStack) -> Runs:
    return Runs(tmp_path, stack)


def made(stack: ExitStack, folder: Path, **names: Any) -> list[Host]:
    try:
        return stack.enter_context(two_hosts(folder, **names))
    except NoHosts as reason:
        pytest.skip(f"no two hosts here: {reason}")


def test_training_on_two_hosts_is_that_of_one_process(hosts: list[Host], runs: Runs) -> None:
    runs.torchrun(hosts, "parity")
    runs.wait(280)
    for rank, found in enumerate(runs.found()):
        for layout, each in found.items():
            is_across = layout == "across"
            assert each["host"] == ("host-a" if rank < 2 else "host-b")
            assert each["losses apart"] <= 1e-5 and each["weights apart"] <= 1e-5, layout
            assert each["transports"] == [GLOO if is_across else SHARED_MEMORY], layout
            assert len(each["warnings"]) == (is_across and rank < 2), each["warnings"]
            if each["warnings"]:
                spans = f"spans hosts: rank {rank} on host-a; rank {rank + 2} on host-b. "
                assert spans in each["warnings"][0]
    assert [host.shared_files() for host in hosts] == [[], []]
