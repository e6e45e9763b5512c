# SPDX-License-Identifier: Apache-2.0
"""Ranks on this machine, and how they end."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from deepspeed_autotp.distributed.local_processes import RankError, preload, run_on_ranks


@pytest.fixture(autouse=True)
def _preloaded() -> None:
    # As the command asks for it: who comes first decides for all.
    preload(("torch", "deepspeed_autotp.cli.check_ranks", "transformers"))


def total(tell: Callable[[int], None], value: float) -> float:
    mine = torch.tensor(value + dist.get_rank())
    dist.all_reduce(mine)
    tell(dist.get_rank())
    return float(mine)


def fails(tell: Callable[[int], None], how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raises":
            raise ValueError("no such thing")
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    dist.barrier()


def test_ranks_talk_tell_and_return() -> None:
    told: list[int] = []
    assert run_on_ranks(total, 1.0, ranks=2, timeout=60, told=told.append) == [3.0, 3.0]
    assert sorted(told) == [0, 1]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("how", "timeout", "words"),
    [
        ("raises", 60.0, "rank 1 failed: ValueError: no such thing"),
        ("is killed", 60.0, "rank 1 failed: it was killed, maybe for want of memory"),
        ("hangs", 4.0, "did not answer within 4 s"),
    ],
)
def test_a_rank_that_fails_ends_all(how: str, timeout: float, words: str) -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=words):
        run_on_ranks(fails, how, ranks=2, timeout=timeout)
    assert time.monotonic() - began < 50
    assert multiprocessing.active_children() == []
