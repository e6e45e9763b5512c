# SPDX-License-Identifier: Apache-2.0
"""Two hosts on this machine: namespaces with own network, host name, processes and ``/dev/shm``.

A pair of virtual Ethernet devices is the cable between them. It needs root and the namespaces of
Linux; where these are missing, :class:`NoHosts` says why. Nothing outlives the block, nor
the process.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
INTERFACE = "eth0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
TOOLS = ("setpriv", "unshare", "nsenter", "ip", "mount", "hostname")
# Its first process, with whose end all others of the host end.
START = """
set -e
mount -t tmpfs -o size=256m tmpfs /dev/shm
mount --bind "$2" /etc/hosts
hostname "$1"
ip link set lo up
echo ready
exec sleep infinity
"""


class NoHosts(Exception):
    """Why there cannot be two hosts here."""


class Host:
    """``name`` and ``address`` are those that its processes see."""

    def __init__(self, name: str, address: str, names: Path, stack: ExitStack) -> None:
        self.name = name
        self.address = address
        namespaces = [
            "--mount",
            "--uts",
            "--net",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        self._first = subprocess.Popen(
            [
                "setpriv",
                "--pdeathsig=KILL",
                "unshare",
                *namespaces,
                "sh",
                "-c",
                START,
                "sh",
                name,
                str(names),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        stack.callback(self.kill)
        assert self._first.stdout is not None and self._first.stderr is not None
        if self._first.stdout.readline() != "ready\n":
            self._first.kill()
            raise NoHosts(f"unshare: {self._first.stderr.read().strip()}")
        task = f"/proc/{self._first.pid}/task/{self._first.pid}/children"
        self.process = int(Path(task).read_text().split()[0])
        # The network outlives the processes, as a kernel does, and answers for them.
        stack.callback(os.close, os.open(f"/proc/{self.process}/ns/net", os.O_RDONLY))

    def start(
        self, command: Sequence[str], *, env: Mapping[str, str], output: IO[str]
    ) -> subprocess.Popen[str]:
        """A command on this host, in the folder of the tests. It ends with the host, and not with
        the process that is returned, whose exit code is its own."""
        enter = ["nsenter", f"--target={self.process}", "--mount", "--uts", "--net", "--pid"]
        return subprocess.Popen(
            [*enter, "env", f"--chdir={ROOT}", *command],
            env={**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, **env},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def python(
        self, *arguments: str, env: Mapping[str, str], output: IO[str], by: Sequence[str] = ()
    ) -> subprocess.Popen[str]:
        """As :meth:`start`, of the Python that runs the tests; ``by`` is a command before it."""
        return self.start([*by, sys.executable, *arguments], env=env, output=output)

    def read(self, *command: str) -> str:
        """What a command prints on this host."""
        enter = ["nsenter", f"--target={self.process}", "--mount", "--uts", "--net"]
        return subprocess.run([*enter, *command], check=True, capture_output=True, text=True).stdout

    def shared_files(self) -> list[str]:
        """What is in its ``/dev/shm``."""
        return self.read("ls", "/dev/shm").split()

    def unplug(self) -> None:
        """Pull the cable: packets are lost, and nobody is told."""
        self._link("down")

    def plug(self) -> None:
        self._link("up")

    def kill(self) -> None:
        """End all processes of the host by SIGKILL."""
        self._first.kill()
        self._first.wait()
        for pipe in (self._first.stdout, self._first.stderr):
            assert pipe is not None
            pipe.close()

    def _link(self, state: str) -> None:
        _ip(self.process, "link", "set", INTERFACE, state)


@contextmanager
def two_hosts(
    folder: Path, *, names: tuple[str, str] = ("host-a", "host-b")
) -> Iterator[list[Host]]:
    """Two hosts that see the files of this machine, and each other by address and name."""
    if os.geteuid() != 0:
        raise NoHosts("namespaces need root")
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise NoHosts(f"there is no {missing[0]} here")
    known = folder / "hosts"
    lines = ["127.0.0.1 localhost", *map(" ".join, zip(ADDRESSES, names, strict=True))]
    known.write_text("\n".join(lines) + "\n")
    with ExitStack() as stack:
        hosts = [
            Host(name, address, known, stack)
            for name, address in zip(names, ADDRESSES, strict=True)
        ]
        _connect(*hosts)
        yield hosts


def _connect(first: Host, second: Host) -> None:
    other = ["peer", "name", INTERFACE, "netns", str(second.process)]
    _ip(first.process, "link", "add", INTERFACE, "type", "veth", *other)
    for host in (first, second):
        _ip(host.process, "address", "add", f"{host.address}/24", "dev", INTERFACE)
        host.plug()


def _ip(process: int, *arguments: str) -> None:
    command = ["nsenter", f"--target={process}", "--net", "ip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoHosts(f"{' '.join(command)}: {done.stderr.strip()}")
