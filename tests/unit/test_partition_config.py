# SPDX-License-Identifier: Apache-2.0
"""The rules that presets and ``partition_config`` of the section tensor_parallel come to."""

from typing import Any

import pytest
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig as DeepSpeedTraining

from deepspeed_autotp.config.layer_spec import TPLayerSpec
from deepspeed_autotp.config.training_config import TPTrainingConfig
from tests.support.value_error import message_of

RULES = {"layer_specs": [{"patterns": [".*q_proj"], "partition_type": "row"}]}


def test_a_preset_is_known_in_any_case_and_others_name_the_nearest() -> None:
    assert TPTrainingConfig(preset_model="Llama").get_partition_config_object() is not None
    message = message_of(TPTrainingConfig, preset_model="lama")
    assert message.startswith("tensor_parallel.preset_model: unknown preset 'lama'; did you mean")
    assert "'llama'" in message
    assert "unknown preset ''" in message_of(TPTrainingConfig, preset_model="")


def test_without_preset_and_rules_there_is_no_partition() -> None:
    assert TPTrainingConfig(autotp_size=4).get_partition_config_object() is None
    assert TPTrainingConfig(partition_config={}).get_partition_config_object() is None


@pytest.mark.parametrize("preset", [None, "llama", "phi3"])
@pytest.mark.parametrize("rules", [None, {}, RULES])
def test_the_partition_is_merged_as_in_deepspeed(preset: str | None, rules: Any) -> None:
    given = {"autotp_size": 4, "preset_model": preset, "partition_config": rules}
    ours = TPTrainingConfig(**given).get_partition_config_object()
    theirs = DeepSpeedTraining(**given).get_partition_config_object()
    if theirs is None:
        assert ours is None
        return
    assert ours is not None
    assert ours.tp_size == theirs.tp_size == 4
    mine = [(spec.patterns, spec.partition_type.value) for spec in ours.layer_specs]
    assert mine == [(spec.patterns, spec.partition_type.value) for spec in theirs.layer_specs]


def test_rules_may_stand_alone() -> None:
    config = TPTrainingConfig(partition_config={**RULES, "use_default_specs": False})
    partition = config.get_partition_config_object()
    assert partition is not None
    assert not partition.use_default_specs
    assert len(partition.layer_specs) == 1


def test_a_preset_beside_rules_that_stand_alone_is_refused() -> None:
    assert message_of(
        TPTrainingConfig,
        preset_model="llama",
        partition_config={**RULES, "use_default_specs": False},
    ) == (
        "tensor_parallel.preset_model: 'llama' has no effect, since "
        "partition_config.use_default_specs is false; leave out one of them"
    )


def test_another_tp_size_in_the_rules_is_refused() -> None:
    assert message_of(TPTrainingConfig, autotp_size=4, partition_config={"tp_size": 2}) == (
        "tensor_parallel.partition_config.tp_size: got 2, but autotp_size is 4; leave it out here"
    )
    assert TPTrainingConfig(autotp_size=4, partition_config={"tp_size": 4}).autotp_size == 4


def test_contradictions_are_told_beside_unknown_keys() -> None:
    rules = {"layer_specs": [], "use_default_specs": False}
    with pytest.raises(ValueError) as caught:
        TPTrainingConfig(bogus=1, preset_model="llama", partition_config=rules)
    assert "bogus: unknown key" in str(caught.value)
    assert "preset_model: 'llama' has no effect" in str(caught.value)


def test_a_specification_object_in_a_dictionary_is_refused() -> None:
    text = message_of(TPTrainingConfig, partition_config={"layer_specs": [TPLayerSpec(["a"])]})
    assert "layer_specs[0]" in text and "expected a dictionary" in text
