# SPDX-License-Identifier: Apache-2.0
"""What a step sends, in the files of DeepSpeed's csv monitor."""

import csv
from pathlib import Path

from tests.integration.engine_metrics_ranks import bytes_of_steps, refusals
from tests.support.worker_pool import Pool

ACCUMULATE = 2


def column(folder: Path, name: str) -> list[tuple[int, float]]:
    with (folder / "job" / f"Train_Samples_{name}.csv").open() as file:
        head, *rows = csv.reader(file)
    assert head == ["step", name]
    return [(int(samples), float(value)) for samples, value in rows]


def test_bytes_and_share_of_each_step_are_written(pool: Pool, tmp_path: Path) -> None:
    counted, _ = pool.run(bytes_of_steps, str(tmp_path), ACCUMULATE)
    values = column(tmp_path, "tp_communication_bytes")
    samples = [at for at, _ in column(tmp_path, "lr")]
    assert [at for at, _ in values] == sorted(set(samples))
    assert [value for _, value in values][1:] == counted and counted[0] > 0
    shares = [value for _, value in column(tmp_path, "tp_communication_share")]
    times = [value for _, value in column(tmp_path, "tp_communication_ms")]
    assert len(shares) == len(times) == 3
    assert all(0 < share < 1 for share in shares) and all(ms > 0 for ms in times)


def test_metrics_that_nobody_would_see_are_refused(pool: Pool) -> None:
    for without_monitor, sharded_before, without_engine in pool.run(refusals):
        assert "tensor_parallel.monitor: got true, but no monitor of DeepSpeed" in without_monitor
        assert "but the model was sharded before without it" in sharded_before
        assert "config.monitor: got true, which needs the monitor of" in without_engine
