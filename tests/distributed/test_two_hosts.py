# SPDX-License-Identifier: Apache-2.0
"""Ranks on two hosts train as one process does, and end with an error where a host is gone.

The hosts are namespaces of this machine: tests/support/two_hosts.py.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from benchmarks.step_calls import GLOO, SHARED_MEMORY
from tests.support.two_hosts import Host, NoHosts, two_hosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MODULE = "tests.distributed.two_hosts_ranks"
WITHOUT_SHM = Path(__file__).parents[1] / "support" / "without_shm"
# Nothing is compiled, also in `make long`.
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(WITHOUT_SHM),
}
# What a collective waits for in a test that loses a host, in seconds.
TIMEOUT = 8.0


class Runs:
    """The processes of a test, and what they print and find."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._processes: dict[str, Popen[str]] = {}

    def torchrun(self, hosts: Sequence[Host], case: str, *more: str) -> None:
        """As a user starts a run of two ranks a host, once on each host."""
        for node, host in enumerate(hosts):
            nodes = [] if more else [f"--nnodes={len(hosts)}", f"--node-rank={node}"]
            options = ["--nproc-per-node=2", *nodes, *more]
            meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0].address}:29500"]
            run = ["-m", "torch.distributed.run", *options, *meeting, "-m", MODULE]
            # Or ranks that start again may read addresses of before from the store.
            env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            self._start(f"node {node}", host, [*run, case, str(self.folder)], env)

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


@pytest.mark.long
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


def test_memory_is_shared_by_who_has_the_same_folder_whatever_host_names_say(
    tmp_path: Path, stack: ExitStack, runs: Runs
) -> None:
    # As containers: 0 and 1 are on a host, 2 is on another one of the same name, 3 with 0 and 1
    # under another name.
    first, second = made(stack, tmp_path, names=("node", "node"))
    env = {"MASTER_ADDR": first.address}
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname other; exec "$@"', "sh"]
    for rank, host in enumerate([first, first, second]):
        runs.rank(rank, host, "sharing", env=env)
    runs.rank(3, first, "sharing", env=env, by=renamed)
    runs.wait(120)
    one_name, same_host = [True, True, SHARED_MEMORY], [False, True, SHARED_MEMORY]
    apart, unlike = [True, False, GLOO], [False, False, GLOO]
    assert runs.found() == [
        {"1": one_name, "2": apart, "3": same_host},
        {"0": one_name, "2": apart, "3": same_host},
        {"0": apart, "1": apart, "3": unlike},
        {"0": same_host, "1": same_host, "2": unlike},
    ]
    assert [host.shared_files() for host in (first, second)] == [[], []]


def started(runs: Runs, hosts: Sequence[Host], case: str, seconds: float, placed: str) -> None:
    """Ranks 0 to 3 on the hosts whose indices ``placed`` has."""
    env = {"MASTER_ADDR": hosts[0].address, "TEST_TIMEOUT": str(seconds)}
    for rank, index in enumerate(placed):
        runs.rank(rank, hosts[int(index)], case, env=env)


def test_without_root_there_are_no_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(NoHosts, match="^namespaces need root$"), two_hosts(tmp_path):
        pytest.fail("a user made namespaces")


@pytest.mark.long
def test_an_engine_trains_with_tp_ranks_on_two_hosts(hosts: list[Host], runs: Runs) -> None:
    started(runs, hosts, "cyclic", 60.0, "0101")
    runs.wait(280)
    for rank, each in enumerate(runs.found()):
        assert each["losses apart"] <= 1e-5 and each["weights apart"] <= 1e-5
        assert each["transports"] == [GLOO]
        assert len(each["warnings"]) == (rank == 0)
    (warning,) = runs.found()[0]["warnings"]
    assert "rank 0 on host-a; rank 1 on host-b, and 1 more TP group alike. " in warning
    assert "srun with --distribution=block" in warning


@pytest.mark.long
def test_a_link_that_is_down_for_seconds_delays_training(hosts: list[Host], runs: Runs) -> None:
    started(runs, hosts, "disturbed", 60.0, "0011")
    runs.after_step(3)
    hosts[1].unplug()
    time.sleep(3.0)
    hosts[1].plug()
    runs.wait(120)
    for each in runs.found():
        assert each["losses apart"] <= 1e-5
        assert each["seconds"] >= 3.0


def one_error(text: str) -> str:
    """The last line that a rank has printed, which is of its only traceback."""
    assert text.count("Traceback (most recent call last)") == 1, text
    return text.strip().splitlines()[-1]


@pytest.mark.long
@pytest.mark.parametrize("fault", ["killed", "killed before the others", "cable"])
def test_a_host_that_is_lost_is_one_error_on_every_rank(
    hosts: list[Host], runs: Runs, fault: str
) -> None:
    # TP 2 across the hosts: ranks 0 and 2 are a group, and 1 and 3.
    started(runs, hosts, "endless", TIMEOUT, "0011")
    runs.after_step(2)
    lost = 0 if fault == "killed before the others" else 1
    if fault == "cable":
        hosts[1].unplug()
    else:
        hosts[lost].kill()
    codes = runs.wait(TIMEOUT + 30.0, expected=None)
    survivors = range(4) if fault == "cable" else [rank for rank in range(4) if rank // 2 != lost]
    told = 0
    for rank in survivors:
        assert codes[f"rank {rank}"] == 1
        _, found, said = one_error(runs.log(f"rank {rank}")).partition("lost_ranks.RanksLost: ")
        if not found:  # it was summing gradients with the other rank of its host, which had ended
            continue
        told += 1
        here, there = (f"rank {each} on host-{'ab'[each // 2]}" for each in (rank, (rank + 2) % 4))
        assert said.startswith(f"a collective of a TP group failed on {here}, with {there}: ")
        assert "timeout of 8 s" in said and "start all ranks again from the last" in said
    assert told
    left = [host.shared_files() for index, host in enumerate(hosts) if index != lost]
    assert left == [[]]


@pytest.mark.long
def test_torchrun_ends_where_the_other_host_is_killed(hosts: list[Host], runs: Runs) -> None:
    runs.torchrun(hosts, "endless_engine")
    runs.after_step(2)
    hosts[1].kill()
    codes = runs.wait(90, expected=None)
    assert codes["node 0"] == 1
    found = re.findall(r"^\[rank(\d)\]: .*RanksLost: (.*)", runs.log("node 0"), re.MULTILINE)
    # torchrun ends the other rank as soon as one has failed, maybe before it can say so.
    assert 1 <= len(found) <= 2
    for rank, said in found:
        other = 1 - int(rank)
        assert said.startswith(
            f"a collective of DeepSpeed's engine failed on rank {rank} on host-a, with rank "
            f"{other} on host-a, rank 2 on host-b, rank 3 on host-b: one of them or its host has "
            "ended, or did not answer within the timeout of 60 s; look at its own error"
        )
    assert hosts[0].shared_files() == []


@pytest.mark.long
def test_torchrun_goes_on_with_one_host_from_the_last_checkpoint(
    hosts: list[Host], runs: Runs
) -> None:
    conf = "--rdzv-conf=last_call_timeout=20"
    runs.torchrun(hosts, "elastic", "--nnodes=1:2", "--max-restarts=3", conf)
    runs.after_step(2)
    hosts[1].kill()
    codes = runs.wait(240, expected=None)
    assert codes["node 0"] == 0, runs.log("node 0")
    for rank in range(2):
        found = json.loads((runs.folder / f"{rank}.json").read_text())
        assert found["first"] >= 2, "it began anew"
        assert found["losses apart"] <= 1e-5
    assert hosts[0].shared_files() == []
