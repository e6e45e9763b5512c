# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapters before and after sharding: trained, merged and saved as in one process."""

from pathlib import Path

import pytest

from tests.integration import peft_ranks
from tests.support.engine_config import Setting
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


def test_what_a_sharded_model_cannot_take_is_refused_alike_on_every_rank(pool: Pool) -> None:
    first, second = pool.run(peft_ranks.refusals)
    assert first[0] == second[0]
    for name, part in {
        "DoRA": "use_dora: got True",
        "PiSSA": "init_lora_weights: got 'pissa', expected one of [True, False",
        "tokens": "trainable_token_indices: got [1]",
        "IA3": "peft_type: got IA3, expected LORA",
        "prefix": "peft_type: got PREFIX_TUNING, expected LORA",
        "no such layer": "not found in the base model",
        "other ranks": "lora_A.default.weight",
        "load_adapter": "call peft.PeftModel.from_pretrained(model, folder)",
        "copy": "a copy of a sharded model",
        "combined": "add_weighted_adapter: the model is sharded",
        "on meta": "low_cpu_mem_usage: got True",
        "safe merge": "safe_merge: got True, expected False",
        "safe unload": "safe_merge: got True, expected False",
        "merged while gathered": "cannot be merged or unmerged within gather_params",
        "a batch of adapters": "adapter_names: got several adapters for one batch",
        "of transformers": "use_dora: got True",
        "parametrized": "q_proj' was changed after the model was sharded",
        "destroyed": "the model was destroyed",
    }.items():
        assert first[0][name].startswith("ValueError: ") and part in first[0][name], name
    assert large_differences(first[1]) == {}


def test_the_model_is_as_it_was_where_one_rank_failed(pool: Pool) -> None:
    for said, same, found in pool.run(peft_ranks.one_rank_fails):
        for each in ("merged", "added", "deleted", "of transformers"):
            assert "on rank 1 of 2: RuntimeError: this rank failed" in said[each]
            assert same[each], each
        assert large_differences(found) == {}


def test_a_loss_and_a_forward_that_a_user_set_stay(pool: Pool) -> None:
    assert pool.run(peft_ranks.user_attributes) == [(7.0, True)] * 2


def test_a_part_of_a_sharded_model_is_refused(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(peft_ranks.parts, str(tmp_path))
    assert first == second
    inside = "is a part of a sharded PeftModelForCausalLM"
    own = "its save_pretrained would write this rank's shards only"
    for name, said in first.items():
        own_way = "lm_head.weight was replaced" if name == "replaced" else inside
        assert said.startswith("ValueError: ")
        assert (own if " save_pretrained" in name else own_way) in said, (name, said)
    assert list(tmp_path.iterdir()) == []


def test_other_kinds_of_adapters_are_refused_by_name(pool: Pool) -> None:
    first, second = pool.run(peft_ranks.other_kinds)
    assert first == second
    for name, said in first.items():
        assert said.startswith("ValueError: ") and name in said.lower(), said


def test_kinds_on_replicated_layers_train_as_in_one_process(pool: Pool) -> None:
    for found in pool.run(peft_ranks.on_replicated_layers):
        assert large_differences(found) == {}


@pytest.mark.parametrize(("zero", "late"), [(0, True), (2, False), (3, True)])
def test_an_engine_trains_adapters_as_one_process(pool: Pool, zero: int, late: bool) -> None:
    single = Setting(tp=1, zero=0, clip=0.5)
    expected, _ = pool.run(peft_ranks.engine_curve, single, False, ranks=1)[0]
    setting = Setting(tp=2, zero=zero, clip=0.5)
    for losses, said in pool.run(peft_ranks.engine_curve, setting, late):
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
    losses = pool.run(peft_ranks.save_engine, saved, is_late, str(tmp_path), ranks=2)[0]
    again = pool.run(peft_ranks.load_engine, loaded, str(tmp_path), ranks=2)[0]
    assert again == pytest.approx(losses, rel=1e-5)
