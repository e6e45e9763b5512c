# SPDX-License-Identifier: Apache-2.0
"""A Trainer and Accelerate with install(): they count, gather and report as without TP.

``make loops`` runs all cases.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.integration.replicas_ranks import (
    accelerate_counts,
    left_out_plugin,
    replaced_names,
    trainer_counts,
)
from tests.support.near import near
from tests.support.worker_pool import Pool

ALL = bool(os.environ.get("AUTOTP_LOOPS"))
TRAINER: dict[str, dict[str, Any]] = {
    "one batch": {},
    "an epoch of a stream": {"streams": True, "num_train_epochs": 1, "max_steps": 4},
    "local means": {"average_tokens_across_devices": False},
}
MORE: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "own streams": {"streams": True, "accelerator_config": {"dispatch_batches": False}},
    "dispatched": {"accelerator_config": {"dispatch_batches": True}},
    "split batches": {"accelerator_config": {"split_batches": True}},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "rebalanced": {"train_sampling_strategy": "rebalance"},
    "workers": {"dataloader_num_workers": 1},
    "whole batches": {"dataloader_drop_last": True, "max_steps": -1, "num_train_epochs": 1},
    "smoothed labels": {"label_smoothing_factor": 0.1},
}
LOADING: dict[str, dict[str, Any]] = {
    "sharded": {},
    "split": {"split_batches": True},
    "dispatched": {"dispatch_batches": True},
}


@pytest.mark.parametrize("ranks", [4, 2] if ALL else [4])
@pytest.mark.parametrize("name", {**TRAINER, **MORE} if ALL else TRAINER)
def test_a_trainer_reports_what_it_does_without_tensor_parallelism(
    pool: Pool, name: str, ranks: int, tmp_path: Path
) -> None:
    more = {**TRAINER, **MORE}[name]
    got = pool.run(trainer_counts, 2, str(tmp_path), more, ranks=ranks)
    expected = pool.run(trainer_counts, 1, str(tmp_path), more, ranks=ranks // 2)[0]
    assert all(each == near(expected) for each in got), (got[0], expected)


@pytest.mark.parametrize("name", LOADING if ALL else ["sharded", "dispatched"])
def test_accelerate_sees_replicas_in_the_place_of_ranks(pool: Pool, name: str) -> None:
    got = pool.run(accelerate_counts, 2, LOADING[name], ranks=4)
    expected = pool.run(accelerate_counts, 1, LOADING[name], ranks=2)[0]
    assert [each.pop("main") for each in got] == [True, False, False, False]
    del expected["main"]
    assert all(each == near(expected) for each in got), (got[0], expected)
    assert (got[0]["processes"], got[0]["triggered"]) == (2, True)


def test_an_accelerator_that_would_shard_nothing_is_an_error(pool: Pool) -> None:
    for sharded, plain in pool.run(left_out_plugin):
        assert "got tensor_parallel.autotp_size 2 in its DeepSpeed plugin" in sharded
        assert "call accelerate.PartialState(cpu=True) before" in sharded
        assert plain == "nothing"


def test_uninstall_puts_everything_back(pool: Pool) -> None:
    assert pool.run(replaced_names, ranks=1) == [[]]
