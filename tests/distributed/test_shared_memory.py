# SPDX-License-Identifier: Apache-2.0
"""Ranks of one machine sum and gather in memory that they share, with the results of sockets."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.step_calls import GLOO, SHARED_MEMORY
from tests.distributed import shared_memory_ranks as jobs
from tests.support.worker_pool import Pool

ROOT = Path(__file__).resolve().parents[2]
# What is lost by rounding: of numbers up to some 40, whose sum may be small, and of the sum.
APART = {
    torch.float32: 1e-5,
    torch.float64: 2e-14,
    torch.bfloat16: 2**-8,
    torch.int64: 0.0,
}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", APART, ids=str)
def test_results_are_those_of_sockets(pool: Pool, dtype: torch.dtype, ranks: int) -> None:
    assert max(pool.run(jobs.against_sockets, dtype, ranks=ranks)) <= APART[dtype]


def test_a_step_goes_through_memory_with_the_same_bits_on_all_ranks(pool: Pool) -> None:
    for transports, same, left in pool.run(jobs.of_a_step, ranks=4):
        assert transports == {SHARED_MEMORY}
        assert same
        assert not left, "a file in /dev/shm outlives its opening"


@pytest.mark.parametrize(("off_on", "expected"), [(0, GLOO), (1, GLOO), (2, SHARED_MEMORY)])
def test_one_rank_that_does_not_want_it_is_enough(pool: Pool, off_on: int, expected: str) -> None:
    assert pool.run(jobs.carried, off_on) == [expected] * 2


def test_what_it_cannot_sum_goes_through_the_group(pool: Pool) -> None:
    for transports in pool.run(jobs.kinds_left_to_sockets):
        assert transports == [GLOO, SHARED_MEMORY]


def test_sums_are_formed_once_and_in_order_whenever_they_are_waited_for(pool: Pool) -> None:
    for found in pool.run(jobs.irregular):
        assert found == {
            "late": [2.0, 2.0],
            "early": [4.0, 4.0],
            "dropped": [6.0, 6.0],
            "refused": [0.0, 0.0, 0.0],
            "last": [8.0, 8.0],
        }


@pytest.mark.parametrize("what", ["lengths", "types", "collectives"])
def test_tensors_that_are_not_alike_are_an_error_on_every_rank(pool: Pool, what: str) -> None:
    for first, again in pool.run(jobs.unlike, what):
        assert "all ranks of a TP group need the same batch and the same code" in first
        assert "a collective of this group has failed before" in again


def test_a_group_recovers_from_a_collective_that_failed(pool: Pool) -> None:
    assert pool.run(jobs.recovered) == [[2.0, 2.0, 1.0]] * 2


@pytest.mark.parametrize(
    ("case", "expected", "mapped"),
    [
        ("variable", "AUTOTP_SHARED_MEMORY is 'off', expected 0 or 1", 0),
        ("device", "", 1),
        ("failure", "connection lost", 0),
    ],
)
def test_a_bad_environment_is_an_error_and_leaves_nothing(
    pool: Pool, case: str, expected: str, mapped: int
) -> None:
    for said, left, maps in pool.run(jobs.opened_with, case):
        assert said.startswith(expected) and bool(said) == bool(expected)
        assert not left and maps == mapped


def test_it_ends_with_its_last_user(pool: Pool) -> None:
    # Rank 0 still has the memory that rank 1 has closed, which is not used again.
    assert pool.run(jobs.mapped_after_use) == [[1, 1, 2, 0], [1, 0, 1, 0]]


LOSES_A_RANK = """
import os, sys, time
import torch, torch.distributed as dist

dist.init_process_group("gloo")
from deepspeed_autotp.distributed.process_group import TPGroup

group = TPGroup(dist.group.WORLD)
group.share_memory()
group.all_reduce(torch.ones(3))
if group.rank == 1:
    os._exit(0)
began = time.monotonic()
try:
    group.all_reduce(torch.ones(3))
except RuntimeError as error:
    print(f"{time.monotonic() - began:.0f} s: {error}", flush=True)
os._exit(0)
"""


def test_a_rank_that_ends_is_an_error_on_the_others_within_a_second(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LOSES_A_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node=2", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    said = done.stdout + done.stderr
    assert "0 s: a collective of a TP group failed on rank 0, with rank 1: " in said, said
    assert "rank 1 of the group has ended while rank 0 is in a collective" in said, said
