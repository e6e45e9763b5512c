# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer with install(): TP 2 logs what one process logs."""

from pathlib import Path

import pytest

from tests.pool import Pool
from tests.sft_script import run_sft
from tests.trainer_script import Script

LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("zero", [1, 3])
def test_sft_logs_what_one_process_logs(pool: Pool, zero: int, tied: bool, tmp_path: Path) -> None:
    sharded, plain = (
        Script(str(tmp_path / f"tp{tp}"), tp=tp, zero=zero, tied=tied) for tp in (2, 1)
    )
    got = pool.run(run_sft, sharded, ranks=2, timeout=110)[0]
    expected = pool.run(run_sft, plain, ranks=1, timeout=110)[0]
    for a, b in zip(got[:-1], expected[:-1], strict=True):
        assert {key: a[key] for key in LOGGED} == pytest.approx(
            {key: b[key] for key in LOGGED}, rel=1e-4
        )
