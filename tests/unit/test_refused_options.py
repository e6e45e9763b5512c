# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's options that are refused beside tensor parallelism, and those that are left alone."""

from typing import Any

import pytest

from deepspeed_autotp.config.load_config import (
    refuse_expert_parallel,
    refuse_misspelt_section,
)
from deepspeed_autotp.config.refused_options import _REFUSED, refuse_options
from deepspeed_autotp.interop.deepspeed.engine import gather_weights_on_save
from tests.support.options import Option
from tests.support.options_table import TABLE


def test_all_refused_options_come_in_one_error() -> None:
    config = {"sequence_parallel_size": 2, "zero_optimization": {"zero_hpz_partition_size": 4}}
    with pytest.raises(ValueError, match="beside tensor parallelism") as caught:
        refuse_options(config, mesh_param=(2, 2))
    _, first, second, third = str(caught.value).splitlines()
    assert "sequence_parallel_size: got 2" in first and "sequence_parallel" in first
    assert second.startswith("zero_optimization.zero_hpz_partition_size: got 4")
    assert third.startswith("mesh_param: got (2, 2)")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"sequence_parallel_size": 1, "compile": {"deepcompile": False}},
        {"expert_parallel": {"enabled": False}, "hybrid_engine": {"enabled": False}},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1, "zenflow": None}},
        {"zero_optimization": {"offload_optimizer": None, "zero_quantized_weights": False}},
        {"zero_optimization": True, "data_efficiency": {"enabled": True}},
        {"data_efficiency": {"enabled": False, "data_routing": {"random_ltd": {"enabled": True}}}},
        {"zero_optimization": {"zero_hpz_partition_size": "auto", "zenflow": None}},
    ],
)
def test_options_that_are_off_are_left_alone(config: dict[str, Any]) -> None:
    refuse_options(config)


@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization": {"zero_hpz_partition_size": "2"}},
        {"zero_optimization": {"zero_hpz_partition_size": 2.0}},
        {"zero_optimization": {"zero_quantized_weights": 1}},
        {"compile": {"deepcompile": "1"}},
        {"sequence_parallel_size": "2"},
    ],
)
def test_other_spellings_of_what_is_on_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not supported beside tensor parallelism"):
        refuse_options(config)


@pytest.mark.parametrize(
    "option",
    [each for each in TABLE if each.words.partition(": got")[0] in {o.key for o in _REFUSED}],
    ids=lambda option: option.words,
)
def test_what_the_table_refuses_by_name_is_refused(option: Option) -> None:
    with pytest.raises(ValueError, match="not supported beside tensor parallelism") as caught:
        refuse_options(option.config)
    assert option.words in str(caught.value)


@pytest.mark.parametrize("value", [True, 1, "true"])
def test_commands_without_ranks_refuse_expert_parallelism(value: object) -> None:
    refuse_expert_parallel({"expert_parallel": {"enabled": False}}, called="autotp plan")
    refuse_expert_parallel({}, called="autotp plan")
    with pytest.raises(ValueError, match="^autotp plan: .*expert_parallel.enabled") as caught:
        refuse_expert_parallel({"expert_parallel": {"enabled": value}}, called="autotp plan")
    assert "leave it out" in str(caught.value)


def test_a_section_of_deepspeed_is_no_slip_of_ours() -> None:
    refuse_misspelt_section({"expert_parallel": {"enabled": True}})


def test_the_old_name_of_a_key_is_not_given_beside_the_new_one() -> None:
    old: dict[str, Any] = {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True}
    config = {"zero_optimization": dict(old)}
    gather_weights_on_save(config)
    assert config["zero_optimization"] == old
