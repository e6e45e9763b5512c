# SPDX-License-Identifier: Apache-2.0
"""examples/hosts: one small training, however its ranks are started."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from tests.support.two_hosts import Host, NoHosts, two_hosts

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
HOSTS = EXAMPLES / "hosts"
WITHOUT_SHM = ROOT / "tests" / "support" / "without_shm"
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "PYTHONPATH": os.pathsep.join([str(WITHOUT_SHM), str(ROOT)]),
}
STEPS = 3


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with ExitStack() as stack:
        try:
            made = stack.enter_context(two_hosts(tmp_path))
        except NoHosts as reason:
            pytest.skip(f"no two hosts here: {reason}")
        yield made


@pytest.fixture(scope="module")
def single() -> list[float]:
    """The losses of one process."""
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_hosts.py"), "--tp=1", f"--steps={STEPS}"],
        env={**os.environ, **ENVIRONMENT, **environment, "MASTER_PORT": "29533"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return losses(done.stdout)


def losses(printed: str) -> list[float]:
    """The line of numbers."""
    (line,) = re.findall(r"^\[[\d., ]+\]$", printed, re.MULTILINE)
    found: list[float] = json.loads(line)
    return found


def torchrun(rank: int, first: Host) -> tuple[list[str], dict[str, str]]:
    script = str(HOSTS / "torchrun.sh")
    return ([] if rank % 2 else [script, first.address, "2", "2"]), {}


def deepspeed(rank: int, first: Host) -> tuple[list[str], dict[str, str]]:
    launcher = f"--no_ssh --node_rank={rank // 2} --master_addr={first.address}"
    return ([] if rank % 2 else [str(HOSTS / "deepspeed.sh"), "2"]), {"LAUNCHER": launcher}


def srun(rank: int, first: Host) -> tuple[list[str], dict[str, str]]:
    """What srun of two tasks a node sets, and the script."""
    environment = {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % 2),
        "SLURM_NTASKS": "4",
        "MASTER_ADDR": first.address,
        "MASTER_PORT": "29500",
    }
    return [sys.executable, str(EXAMPLES / "train_hosts.py"), "--tp=2"], environment


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", [torchrun, deepspeed, srun])
def test_a_launcher_trains_on_two_hosts_as_one_process_does(
    hosts: list[Host], single: list[float], launcher: Any, tmp_path: Path
) -> None:
    (tmp_path / "hostfile").write_text("host-a slots=2\nhost-b slots=2\n")
    written = tmp_path / "losses.json"
    with ExitStack() as stack:
        started = []
        for rank in range(4):
            command, environment = launcher(rank, hosts[0])
            if not command:  # one command starts the ranks of a host
                continue
            output = stack.enter_context((tmp_path / f"{rank}.log").open("w"))
            more = [f"--steps={STEPS}", f"--losses={written}"]
            environment |= {**ENVIRONMENT, "HOSTFILE": str(tmp_path / "hostfile")}
            process = hosts[rank // 2].start([*command, *more], env=environment, output=output)
            started.append((rank, process))
        for rank, process in started:
            code = process.wait(timeout=300)
            assert code == 0, (tmp_path / f"{rank}.log").read_text()
    assert json.loads(written.read_text()) == pytest.approx(single, rel=1e-4)


@pytest.mark.long
@pytest.mark.timeout(500)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_train_on_two_nodes_trains_as_one_process_does(
    single: list[float], tmp_path: Path
) -> None:
    script = tmp_path / "cluster.py"
    script.write_text(CLUSTER)
    written = tmp_path / "losses.json"
    arguments = [str(EXAMPLES / "train_ray.py"), "--workers=4", "--tp=2"]
    arguments += [f"--steps={STEPS}", f"--losses={written}"]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, **ENVIRONMENT, "RAY_USAGE_STATS_ENABLED": "0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(written.read_text()) == pytest.approx(single, rel=1e-4)


# Two nodes of a Ray cluster on this machine, and a command that uses them.
CLUSTER = """
import os, subprocess, sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
cluster.add_node(num_cpus=2)
environment = {**os.environ, "RAY_ADDRESS": cluster.address}
code = subprocess.run([sys.executable, *sys.argv[1:]], env=environment).returncode
cluster.shutdown()
sys.exit(code)
"""


def test_the_manifest_of_kubernetes_says_one_thing_in_all_places() -> None:
    service, job = yaml.safe_load_all((HOSTS / "kubernetes.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert service["spec"].keys() == {"clusterIP", "publishNotReadyAddresses", "selector", "ports"}
    assert service["spec"]["clusterIP"] == "None", "a name for each pod"
    assert service["spec"]["publishNotReadyAddresses"] is True, "before they are ready"
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec.keys() == {
        "completionMode",
        "completions",
        "parallelism",
        "backoffLimit",
        "template",
    }
    assert pod.keys() == {"subdomain", "restartPolicy", "containers", "volumes"}
    assert spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    script = container["command"][1]
    first, pods, ranks = container["args"][:3]
    assert (ROOT / script).exists() and container["workingDir"]
    assert first == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert spec["completions"] == spec["parallelism"] == int(pods)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == ranks
    port = int(re.findall(r":(\d+)\"", (ROOT / script).read_text())[0])
    assert service["spec"]["ports"][0]["port"] == container["ports"][0]["containerPort"] == port
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/dev/shm"}
    assert volume["emptyDir"]["medium"] == "Memory"


def test_the_script_for_slurm_asks_for_what_a_tp_group_needs() -> None:
    text = (HOSTS / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["distribution"].split(":")[0] == "block"
    assert "--kill-on-bad-exit=1" in text, "or the other ranks wait for the timeout"
    done = subprocess.run(["bash", "-n", str(HOSTS / "slurm.sbatch")], capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}, "3 1 4"),
        # torchrun within an allocation of Slurm
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "SLURM_PROCID": "0"}, "5 1 8"),
    ],
)
def test_a_rank_has_the_name_that_its_launcher_gives(
    given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    train_hosts = importlib.import_module("train_hosts")
    with mock.patch.dict(os.environ, given, clear=True):
        train_hosts.name_rank()
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        assert " ".join(os.environ[name] for name in names) == expected
