# SPDX-License-Identifier: Apache-2.0
"""Which host a rank is on, and the warning where a TP group spans hosts."""

import pickle
import socket
from pathlib import Path

import pytest

from deepspeed_autotp.distributed import hosts
from deepspeed_autotp.distributed.hosts import Host, this_host
from deepspeed_autotp.sharding.host_span import spanning_warning
from deepspeed_autotp.sharding.weight_location import RankReport

SENTENCE = (
    "The sums of every row layer in the forward pass, and of every column layer in the backward "
    "pass, go over the network in each step. "
)
DIVIDES = "Take a TP size that divides the ranks of each host, which has "


def reports(layout: str) -> list[RankReport]:
    """A letter is the host of a rank; hosts of one name, ``x`` and ``y``, have other memory."""
    names = {"x": "node", "y": "node"}
    return [
        RankReport(rank, Host(names.get(letter, letter), ord(letter)), "cpu", partitioned=False)
        for rank, letter in enumerate(layout)
    ]


@pytest.mark.parametrize(
    ("layout", "tp", "expected"),
    [
        ("aabb", 2, ""),
        ("aaaabbbb", 2, ""),
        ("xxyy", 2, ""),
        (
            "aabb",
            4,
            "a TP group of 4 ranks spans hosts: ranks 0, 1 on a; ranks 2, 3 on b. " + SENTENCE
            + "Take a TP group whose ranks are on one host",
        ),
        (
            "xy",
            2,
            "a TP group of 2 ranks spans hosts: rank 0 on node; rank 1 on node. " + SENTENCE
            + "Take a TP group whose ranks are on one host",
        ),
        (
            "abab",
            2,
            "a TP group of 2 ranks spans hosts: rank 0 on a; rank 1 on b, and 1 more TP group "
            "alike. " + SENTENCE + "Number the ranks of a host consecutively, as torchrun does, "
            "and srun with --distribution=block: TP groups are consecutive ranks",
        ),
        (
            "aaabbb",
            2,
            "a TP group of 2 ranks spans hosts: rank 2 on a; rank 3 on b. " + SENTENCE + DIVIDES
            + "3 ranks",
        ),
        (
            "aabcdefgaaaaaaaa",
            8,
            "a TP group of 8 ranks spans hosts: ranks 0, 1 on a; rank 2 on b; rank 3 on c; rank 4 "
            "on d; 3 more hosts. " + SENTENCE + DIVIDES + "1 to 10 ranks",
        ),
    ],
)  # fmt: skip
def test_a_tp_group_that_spans_hosts_is_told(layout: str, tp: int, expected: str) -> None:
    assert spanning_warning(reports(layout), tp) == expected


def test_a_host_is_a_kernel_and_its_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = this_host()
    assert here == this_host() == pickle.loads(pickle.dumps(here))
    assert str(here) == socket.gethostname()
    monkeypatch.setattr(hosts, "_MEMORY", tmp_path)
    assert this_host() != here, "another folder of shared memory"
    monkeypatch.setattr(hosts, "_MEMORY", tmp_path / "none")
    nowhere = this_host()
    assert nowhere != here
    monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
    assert this_host() != nowhere, "without shared memory the name decides"
    monkeypatch.undo()
    monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
    assert this_host() == here, "with it the name does not"
