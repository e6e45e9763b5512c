# SPDX-License-Identifier: Apache-2.0
"""initialize accepts and returns what DeepSpeed's does, beside the configuration."""

import subprocess
import sys
from typing import Any

import pytest

from tests.integration import initialize_arguments_ranks
from tests.support.loss_curves import RATE
from tests.support.worker_pool import Pool

BOUND = 1e-5


@pytest.mark.parametrize(
    "kind",
    [
        "built before",
        "with model_parameters",
        "callable",
        "groups",
        "config SGD",
        "config Adam",
    ],
)
@pytest.mark.parametrize("zero", [0, 1])
def test_an_optimizer_comes_in_every_way(pool: Pool, kind: str, zero: int) -> None:
    for worst in pool.run(initialize_arguments_ranks.train_with_optimizer, kind, zero, timeout=110):
        assert worst < BOUND


@pytest.mark.parametrize("kind", ["callable", "object", "config"])
def test_a_scheduler_is_stepped_and_returned(pool: Pool, kind: str) -> None:
    for rates in pool.run(initialize_arguments_ranks.train_with_scheduler, kind):
        if kind == "config":
            assert rates[-1] == RATE
        else:
            expected = [
                RATE * 0.5 ** (step + 1) for step in range(initialize_arguments_ranks.STEPS)
            ]
            assert rates == pytest.approx(expected)


def test_ranks_of_one_model_are_given_the_same_rows(pool: Pool) -> None:
    first, second, third, fourth = pool.run(initialize_arguments_ranks.rows_of_loader, ranks=4)
    assert first == second and third == fourth
    assert sorted(sum(first + third, [])) == list(range(8))


@pytest.mark.parametrize(
    "section",
    [
        None,
        {},
        {"autotp_size": 0},
        {"autotp_size": 1},
        {"autotp_size": 0, "preset_model": "llama", "tp_grain_size": 64, "dtype": "bf16"},
        {"autotp_size": 1, "tp": {"tp_size": 1}},
    ],
)
def test_a_tp_size_of_one_goes_straight_through(pool: Pool, section: dict[str, Any] | None) -> None:
    for same, own, worst in pool.run(
        initialize_arguments_ranks.straight_through, section, timeout=110
    ):
        assert same and own and worst < BOUND


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_model_of_ones_own_trains_through_deepspeed(pool: Pool, ranks: int) -> None:
    for worst in pool.run(initialize_arguments_ranks.train_handmade, ranks=ranks):
        assert worst < BOUND


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_model_that_is_sharded_before_goes_into_an_engine(pool: Pool, ranks: int) -> None:
    for worst in pool.run(initialize_arguments_ranks.parallelize_first, ranks=ranks, timeout=110):
        assert worst < BOUND


def test_a_second_attempt_after_deepspeed_failed_trains(pool: Pool) -> None:
    for worst in pool.run(initialize_arguments_ranks.second_attempt, timeout=110):
        assert worst < BOUND


@pytest.mark.parametrize(
    ("way", "groups"),
    [
        ("tp_size", [[0, 1], [0, 1], [2, 3], [2, 3]]),
        ("group", [[0, 2], [1, 3], [0, 2], [1, 3]]),
        ("mesh", [[0, 2], [1, 3], [0, 2], [1, 3]]),
        ("config", [[0, 1, 2, 3]] * 4),
        ("nested", [[0, 1], [0, 1], [2, 3], [2, 3]]),
    ],
)
def test_parallelize_is_told_the_ranks_in_every_way(
    pool: Pool, way: str, groups: list[list[int]]
) -> None:
    results = pool.run(initialize_arguments_ranks.sharded_by, way, ranks=4)
    assert [ranks for ranks, _ in results] == groups
    assert all(difference < BOUND for _, difference in results)


def test_a_start_without_a_launcher_is_told() -> None:
    script = (
        "import torch, deepspeed_autotp as d; d.initialize(model=torch.nn.Linear(2, 2), config={})"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: initialize: no launcher started this process")
    assert "torchrun" in last and "mpi4py" not in ran.stderr
