# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapters before and after sharding: trained, merged and saved as in one process."""

from pathlib import Path

import pytest

from tests.integration import peft_ranks
from tests.support.large_differences import large_differences
from tests.support.worker_pool import Pool


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", peft_ranks.CASES)
def test_adapters_on_a_sharded_model_train_as_in_one_process(pool: Pool, case: str) -> None:
    # Three ranks: the heads and features of the ranks differ.
    for begins, planned, found in pool.run(peft_ranks.late, case, ranks=3):
        assert begins and planned
        assert large_differences(found) == {}


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("case", "late"),
    [
        ("one key/value head", True),
        ("embedding and head", True),
        ("trained in full", False),
        ("biases", False),
        ("transposed layers", False),
        ("tied head and embedding", False),
        ("fused layers", True),
    ],
)
def test_adapters_are_merged_into_shards(pool: Pool, case: str, late: bool, tmp_path: Path) -> None:
    for found in pool.run(peft_ranks.merged, case, late, str(tmp_path), ranks=3):
        assert large_differences(found) == {}


@pytest.mark.sample(2)
@pytest.mark.parametrize("late", [True, False])
def test_copies_of_tied_layers_are_sharded_as_the_originals(
    pool: Pool, late: bool, tmp_path: Path
) -> None:
    for found in pool.run(peft_ranks.trained_in_full, late, str(tmp_path), ranks=3):
        assert large_differences(found) == {}


def test_several_adapters_are_trained_saved_and_deleted(pool: Pool, tmp_path: Path) -> None:
    for found, same_files in pool.run(peft_ranks.several, str(tmp_path)):
        assert large_differences(found) == {}
        assert same_files


def test_a_save_that_fails_leaves_nothing_behind(pool: Pool, tmp_path: Path) -> None:
    for said, left in pool.run(peft_ranks.blocked, str(tmp_path)):
        assert "two' is a file, expected a folder" in said
        assert left == ["two"]


def test_files_are_those_of_one_process_and_load_at_another_size(
    pool: Pool, tmp_path: Path
) -> None:
    for differ, said in pool.run(peft_ranks.save, str(tmp_path), ranks=3):
        assert differ == []
        assert "call deepspeed_autotp.save_pretrained(model, folder)" in said
    for same, again, found in pool.run(peft_ranks.load, str(tmp_path)):
        assert same and again
        assert large_differences(found) == {}


def test_models_that_were_loaded_as_shards_take_adapters(pool: Pool, tmp_path: Path) -> None:
    for found in pool.run(peft_ranks.shards_first, str(tmp_path)):
        assert large_differences(found) == {}


def test_a_loss_and_a_forward_that_a_user_set_stay(pool: Pool) -> None:
    assert pool.run(peft_ranks.user_attributes) == [(7.0, True)] * 2


def test_kinds_on_replicated_layers_train_as_in_one_process(pool: Pool) -> None:
    for found in pool.run(peft_ranks.on_replicated_layers):
        assert large_differences(found) == {}
