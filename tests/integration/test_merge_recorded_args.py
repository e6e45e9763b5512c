# SPDX-License-Identifier: Apache-2.0
"""Recorded arguments, configuration and the arguments of initialize become one configuration."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed_autotp
from tests.integration import merge_recorded_args_ranks
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool

pytestmark = pytest.mark.usefixtures("no_records")


class Dist:
    """A torch.distributed in which a group is the tuple of its ranks."""

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def get_world_size(group: tuple[int, ...]) -> int:
        return len(group)


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(4, 4)


GROUP, OTHER, LONGER = (0, 1), (2, 3), (0, 1, 2, 3)
MESH = object()


def merged(config: dict[str, Any], mpu: Any = None, mesh: Any = MESH) -> dict[str, Any]:
    """As by itself; a mesh keeps it from making groups, for which ranks are needed."""
    deepspeed_autotp.merge_tp_model_init_into_config(config, mpu, mesh, Dist)
    return config


def conflicts(config: dict[str, Any], mpu: Any = None) -> list[str]:
    """The lines of the one error; the configuration stays as it was."""
    before = copy.deepcopy({**config, "tensor_parallel": None})
    section = config.get("tensor_parallel")
    held = copy.copy(section)
    with pytest.raises(ValueError) as raised:
        merged(config, mpu)
    assert {**config, "tensor_parallel": None} == before
    assert config.get("tensor_parallel") is section and section == held
    head, *lines, advice = str(raised.value).splitlines()
    assert head.startswith(f"{len(lines)} conflict") and "reset()" in advice
    return [line.removeprefix("  - ") for line in lines]


def test_nothing_is_merged_without_a_record() -> None:
    assert merged({"bf16": {"enabled": True}}) == {"bf16": {"enabled": True}}


def test_what_is_missing_is_filled(model: nn.Module) -> None:
    deepspeed_autotp.tp_model_init(model, 2, "fp32", tp_group=GROUP)
    config: dict[str, Any] = {}
    assert merged(config) == {
        "tensor_parallel": {"autotp_size": 2, "tp": {"tp_size": 2, "tp_group": GROUP}}
    }
    assert config["tensor_parallel"]["tp"]["tp_group"] is GROUP


@pytest.mark.parametrize("spelling", ["tp", "tensor_parallel"])
def test_what_is_there_stays_under_its_spelling(model: nn.Module, spelling: str) -> None:
    deepspeed_autotp.tp_model_init(model, 2, "fp32")
    config = {"tensor_parallel": {"preset_model": "llama", spelling: {"tp_grain_size": 8}}}
    assert merged(config) == {
        "tensor_parallel": {
            "preset_model": "llama",
            "autotp_size": 2,
            spelling: {"tp_grain_size": 8, "tp_size": 2},
        }
    }


def test_auto_is_filled_and_is_not_true(model: nn.Module) -> None:
    deepspeed_autotp.tp_model_init(model, 2, "fp32")
    config = {
        "tensor_parallel": {"autotp_size": "auto", "dtype": "auto", "tp": {"tp_size": "auto"}},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
    }
    section = merged(config)["tensor_parallel"]
    assert section == {"autotp_size": 2, "dtype": "auto", "tp": {"tp_size": 2}}


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"tensor_parallel": {"autotp_size": 4}},
            "TP size: tensor_parallel.autotp_size is 4, but tp_size of tp_model_init is 2",
        ),
        (
            {"tensor_parallel": {"tp": {"tp_size": 4}}},
            "TP size: tensor_parallel.tp.tp_size is 4, but tp_size of tp_model_init is 2",
        ),
        (
            {"bf16": {"enabled": True}},
            "Conflicting dtype: bf16.enabled: true in the configuration, but float32 in "
            "tp_model_init(dtype=float32)",
        ),
        (
            {"fp16": {"enabled": 1}},
            "Conflicting dtype: fp16.enabled: true in the configuration, but float32 in "
            "tp_model_init(dtype=float32)",
        ),
        (
            {"bfloat16": {"enabled": "true"}},
            "Conflicting dtype: bf16.enabled: true in the configuration, but float32 in "
            "tp_model_init(dtype=float32)",
        ),
        (
            {"tensor_parallel": {"dtype": "half"}},
            "Conflicting tensor_parallel.dtype: half in the configuration, but float32 in "
            "tp_model_init(dtype=float32)",
        ),
        (
            {"tensor_parallel": {"dtype": torch.bfloat16}},
            "Conflicting tensor_parallel.dtype: torch.bfloat16 in the configuration, but float32 "
            "in tp_model_init(dtype=float32)",
        ),
    ],
)
def test_a_conflict_names_both_values(model: nn.Module, config: dict[str, Any], line: str) -> None:
    deepspeed_autotp.tp_model_init(model, 2, torch.float32)
    assert conflicts(config) == [line]


def test_all_conflicts_come_in_one_error(model: nn.Module) -> None:
    deepspeed_autotp.tp_model_init(model, 2, "fp32", tp_group=GROUP)
    config = {
        "tensor_parallel": {
            "autotp_size": 8,
            "dtype": "fp16",
            "tp": {"tp_size": 4, "tp_group": LONGER},
        },
        "bf16": {"enabled": True},
    }
    lines = conflicts(config, mpu=object())
    for words in (
        "TP size: tensor_parallel.autotp_size is 8, but tensor_parallel.tp.tp_size is 4, "
        "the size of tensor_parallel.tp.tp_group is 4, tp_size of tp_model_init is 2",
        "mpu: passed to initialize(mpu=...), but tp_model_init provided tp_group",
        "bf16.enabled: true in the configuration, but float32",
        "tensor_parallel.dtype: fp16 in the configuration, but float32",
        "tensor_parallel.dtype: fp16 in the configuration, but true in bf16.enabled",
    ):
        assert [line for line in lines if words in line], words


def test_another_group_of_the_same_size_is_a_conflict(model: nn.Module) -> None:
    deepspeed_autotp.tp_model_init(model, 2, "fp32", tp_group=GROUP)
    (line,) = conflicts({"tensor_parallel": {"tp": {"tp_group": OTHER}}})
    assert f"{id(OTHER):#x} of 2 ranks" in line and f"{id(GROUP):#x}" in line


def test_a_recorded_group_and_an_mpu_are_a_conflict(model: nn.Module) -> None:
    deepspeed_autotp.tp_model_init(model, 2, "fp32", tp_group=GROUP)
    (line,) = conflicts({}, mpu=object())
    assert line.startswith("mpu: passed to initialize(mpu=...)")


def test_an_mpu_without_a_recorded_group_is_fine(model: nn.Module) -> None:
    deepspeed_autotp.tp_model_init(model, 2, "fp32")
    assert merged({}, mpu=object(), mesh=None)["tensor_parallel"]["autotp_size"] == 2


def test_an_unknown_spelling_of_a_data_type_is_listed(model: nn.Module) -> None:
    deepspeed_autotp.tp_model_init(model, 2, "fp32")
    (line,) = conflicts({"tensor_parallel": {"dtype": "bf61"}})
    assert "bf61" in line and "bf16" in line


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"tensor_parallel": 2}, "tensor_parallel: got 2 (int), expected a dictionary"),
        ({"tensor_parallel": {"tp": [2]}}, "tensor_parallel.tp: got [2] (list), expected a dict"),
        (
            {"tensor_parallel": {"autotp_size": "two"}},
            "tensor_parallel.autotp_size: got 'two' (str), expected a number of ranks",
        ),
        (
            {"tensor_parallel": {"tp": {"tp_size": -1}}},
            "tensor_parallel.tp.tp_size: got -1 (int), expected a number of ranks",
        ),
        (
            {"tensor_parallel": {"tp": {"tp_group": 7}}},
            "tensor_parallel.tp.tp_group: got 7 (int), expected a process group",
        ),
        ({"bf16": {"enabled": "perhaps"}}, "bf16.enabled: got 'perhaps' (str)"),
        ([], "config_dict: got [] (list), expected a dictionary"),
    ],
)
def test_wrong_types_are_refused_with_their_key(model: nn.Module, config: Any, words: str) -> None:
    deepspeed_autotp.tp_model_init(model, 2, "fp32")
    before = copy.deepcopy(config)
    with pytest.raises(ValueError) as raised:
        merged(config)
    assert words in str(raised.value)
    assert config == before


def test_a_group_of_another_size_is_not_recorded(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="tp_group has 4 ranks, but tp_size is 2"):
        deepspeed_autotp.record_tp_model_init_args(2, "fp32", LONGER, Dist, model=model)


def test_the_record_of_a_dead_model_is_not_merged() -> None:
    deepspeed_autotp.tp_model_init(nn.Linear(4, 4), 2, "fp32")
    assert merged({}) == {}


def test_groups_are_made_where_nobody_gives_one(pool: Pool) -> None:
    results = pool.run(merge_recorded_args_ranks.make_groups, ranks=4)
    assert [ranks for ranks, _ in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(section == {"autotp_size": 2, "tp": {"tp_size": 2}} for _, section in results)


def test_a_record_holds_for_its_model_and_not_for_another(pool: Pool) -> None:
    for results in pool.run(merge_recorded_args_ranks.records_of_models):
        assert results == {
            "itself": 2,
            "around it": 2,
            "inside it": 2,
            "another": None,
            "after reset": None,
        }


def test_a_record_that_is_left_alone_is_mentioned_once(pool: Pool) -> None:
    first, second = pool.run(merge_recorded_args_ranks.warnings_for_another_model)
    assert second == []
    (line,) = first
    assert "tp_model_init recorded arguments for another model" in line
    assert "LlamaForCausalLM" in line


@pytest.mark.parametrize("kind", ["size", "dtype", "mpu"])
def test_initialize_lists_conflicts_with_the_record(pool: Pool, kind: str) -> None:
    text = same_error(pool.run(merge_recorded_args_ranks.conflicts_in_initialize, kind))
    assert {
        "size": "tensor_parallel.autotp_size is 1, but tp_size of tp_model_init is 2",
        "dtype": "bf16.enabled: true in the configuration, but float32 in tp_model_init",
        "mpu": "mpu: passed to initialize(mpu=...), but tp_model_init provided tp_group",
    }[kind] in text


def test_a_recorded_group_of_consecutive_ranks_is_used(pool: Pool) -> None:
    for worst in pool.run(merge_recorded_args_ranks.train_with_group, ranks=4, timeout=110):
        assert worst < 1e-5


def test_records_that_differ_between_ranks_are_refused(pool: Pool) -> None:
    text = same_error(pool.run(merge_recorded_args_ranks.record_on_one_rank))
    assert "autotp_size: 2 on rank 0, but 0 or 1 on rank 1" in text


@pytest.mark.parametrize("size", [0, 4])
def test_deepspeed_has_groups_of_one_size_only(pool: Pool, size: int) -> None:
    text = same_error(pool.run(merge_recorded_args_ranks.second_engine, size, ranks=4))
    assert f"autotp_size is {size}, but DeepSpeed has groups of 2 ranks" in text


def test_deepspeeds_own_record_is_refused(pool: Pool) -> None:
    text = same_error(pool.run(merge_recorded_args_ranks.recorded_with_deepspeed))
    assert "deepspeed.tp_model_init was called" in text and "install()" in text
