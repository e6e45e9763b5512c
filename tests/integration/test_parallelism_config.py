# SPDX-License-Identifier: Apache-2.0
"""Accelerate's ParallelismConfig around a model that parallelize has sharded."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.integration.parallelism_config_ranks import loaded_on_rank0, loop
from tests.support.worker_pool import Pool

CLOSE = 1e-9


def test_a_loop_trains_and_saves_as_one_process(pool: Pool, tmp_path: Path) -> None:
    results = pool.run(loop, str(tmp_path), ranks=4)
    for rank, (apart, rows, error, _) in enumerate(results):
        assert apart < CLOSE
        assert rows == ([0, 1] if rank < 2 else [2, 3])
        assert "expected deepspeed_autotp.checkpoint_state(model, optimizer)" in error
    full, saved = results[0][3], load_file(tmp_path / "model.safetensors")
    assert full.keys() == saved.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in full.items())


def test_weights_of_rank_0_for_all_ranks_are_refused(pool: Pool) -> None:
    for error in pool.run(loaded_on_rank0, ranks=4):
        assert error.startswith("ValueError") and "have the same shards of" in error
        assert "cpu_ram_efficient_loading=False" in error
