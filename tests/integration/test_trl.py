# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer with install(): TP 2 logs and saves what one process does."""

from pathlib import Path

import pytest

from tests.integration.trl_ranks import run_sft, saved_apart
from tests.support.trainer_script import Script
from tests.support.worker_pool import Pool

LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy")


@pytest.mark.parametrize(
    ("zero", "tied", "lora"),
    [(1, False, False), (3, True, False), (1, True, True), (2, False, True)],
)
def test_sft_logs_and_saves_what_one_process_does(
    pool: Pool, zero: int, tied: bool, lora: bool, tmp_path: Path
) -> None:
    sharded, plain = (
        Script(str(tmp_path / f"tp{tp}"), tp=tp, zero=zero, tied=tied) for tp in (2, 1)
    )
    got = pool.run(run_sft, sharded, lora, ranks=2, timeout=110)[0]
    expected = pool.run(run_sft, plain, lora, ranks=1, timeout=110)[0]
    for a, b in zip(got[:-1], expected[:-1], strict=True):
        assert {key: a[key] for key in LOGGED} == pytest.approx(
            {key: b[key] for key in LOGGED}, rel=1e-4
        )
    if zero < 3:  # of which DeepSpeed writes no full weights in one process
        assert pool.run(saved_apart, (sharded.out, plain.out), ranks=1)[0] < 1e-3
