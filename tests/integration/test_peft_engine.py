# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's engine around a sharded model with adapters: as one process, and at other sizes."""

from pathlib import Path

import pytest

from tests.integration import peft_engine_ranks
from tests.support.engine_config import Setting
from tests.support.worker_pool import Pool


@pytest.mark.parametrize(("zero", "late"), [(0, True), (2, False), (3, True)])
def test_an_engine_trains_adapters_as_one_process(pool: Pool, zero: int, late: bool) -> None:
    single = Setting(tp=1, zero=0, clip=0.5)
    expected, _ = pool.run(peft_engine_ranks.engine_curve, single, False, ranks=1)[0]
    setting = Setting(tp=2, zero=zero, clip=0.5)
    for losses, said in pool.run(peft_engine_ranks.engine_curve, setting, late):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert "before initialize" in said["added"]
        reason = "ZeRO 3 has partitioned" if zero == 3 else "into a model that no engine trains"
        assert reason in said["merged"] and reason in said["deleted"]
        if zero == 3:
            assert "cannot be merged or unmerged" in said["merged in place"]


@pytest.mark.sample(2)
@pytest.mark.parametrize(("zero", "before", "after"), [(1, 2, 1), (0, 1, 2)])
def test_checkpoints_of_adapters_load_at_another_size(
    pool: Pool, zero: int, before: int, after: int, tmp_path: Path
) -> None:
    saved, loaded = (Setting(tp=tp, zero=zero, clip=0.5) for tp in (before, after))
    is_late = before > 1
    losses = pool.run(peft_engine_ranks.save_engine, saved, is_late, str(tmp_path), ranks=2)[0]
    again = pool.run(peft_engine_ranks.load_engine, loaded, str(tmp_path), ranks=2)[0]
    assert again == pytest.approx(losses, rel=1e-5)
