# SPDX-License-Identifier: Apache-2.0
"""The error of a collective whose other ranks are gone."""

import pytest
import torch.distributed as dist

from deepspeed_autotp.distributed.lost_ranks import LostRanks, RanksLost, reason_of

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer"
SAYS = (
    "a collective of a TP group failed on rank 0 on a, with rank 2 on b: one of them or its host "
    "has ended, or did not answer within the timeout of 5 s; look at its own error and at the "
    "network, and start all ranks again from the last checkpoint: "
)


class Broken:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def wait(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"{CLOSED}\nmore"),
        RuntimeError("Application timeout caused pair closure"),
        dist.DistBackendError("NCCL error"),
        RuntimeError("no answer in shared memory: rank 1 of the group has ended"),
    ],
)
def test_ranks_hosts_and_what_to_do_are_said_once(error: Exception) -> None:
    lost = LostRanks("a TP group", 0, (0, 2), 5.0, {0: "a", 2: "b"})
    reason = str(error).partition("\n")[0]
    with pytest.raises(RanksLost) as raised, lost, lost:
        lost.watch(Broken(error)).wait()
    assert str(raised.value) == SAYS + reason
    assert raised.value.__suppress_context__ and reason_of(raised.value) == reason


def test_other_errors_pass() -> None:
    lost = LostRanks("a TP group", 0, (0, 2), None)
    with pytest.raises(RuntimeError, match="^shapes differ$"), lost:
        raise RuntimeError("shapes differ")


def test_of_many_ranks_eight_are_named() -> None:
    lost = LostRanks("a TP group", 3, range(16), None)
    with pytest.raises(RanksLost) as raised, lost:
        raise RuntimeError(CLOSED)
    named = "rank 0, rank 1, rank 2, rank 4, rank 5, rank 6, rank 7, rank 8, ...: one of them"
    assert f"failed on rank 3, with {named}" in str(raised.value)
    assert "within the timeout; look" in str(raised.value)
