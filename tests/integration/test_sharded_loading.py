# SPDX-License-Identifier: Apache-2.0
"""A model that was loaded as shards trains in an engine and under the Trainer."""

from pathlib import Path

import pytest

from tests.integration import sharded_loading_ranks as ranks
from tests.support.trainer_script import Script, run_script, save_untrained
from tests.support.worker_pool import Pool


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_an_engine_trains_it_with_the_losses_of_one_process(
    pool: Pool, tmp_path: Path, zero: int
) -> None:
    assert max(pool.run(ranks.trains, str(tmp_path), zero)) < 1e-5


def test_an_engine_refuses_one_of_other_rules(pool: Pool, tmp_path: Path) -> None:
    for preset, grain, size, same in pool.run(ranks.other_rules, str(tmp_path)):
        assert "tensor_parallel.preset_model is qwen2, but the model was sharded with llama" in (
            preset
        )
        assert "tensor_parallel.tp_grain_size is 32, but the model was sharded with 1" in grain
        assert "the model is sharded over the ranks [0, 1] already" in size
        assert same == "nothing"


@pytest.mark.parametrize("zero", [1, 3])
def test_a_trainer_script_loads_shards_within_one_line(
    pool: Pool, tmp_path: Path, zero: int
) -> None:
    folder = str(tmp_path / "pretrained")
    pool.run(save_untrained, folder, "qwen2", ranks=1)
    scripts = [
        Script(str(tmp_path / how), tp=2, zero=zero, pretrained=folder, sharded_init=how == "own")
        for how in ("own", "full")
        if zero < 3 or how == "own"
    ]
    logs = [pool.run(run_script, script)[0] for script in scripts]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    assert len(losses[0]) == 4
    if zero < 3:  # transformers loads no full weights under ZeRO 3
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
