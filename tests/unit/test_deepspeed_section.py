# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed receives of the section tensor_parallel."""

import json
from typing import Any

import pytest
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig as DeepSpeedTraining

from deepspeed_autotp.config.training_config import TPTrainingConfig, deepspeed_section

RULES = {"layer_specs": [{"patterns": [".*q_proj"], "partition_type": "row"}]}


@pytest.mark.parametrize("size", [0, 1, 2, 8])
@pytest.mark.parametrize("wrap", [dict, lambda fields: TPTrainingConfig(**fields)])
def test_deepspeed_accepts_what_is_passed_on(size: int, wrap: Any) -> None:
    group, mpu = object(), object()
    section = deepspeed_section(
        wrap(
            {
                "autotp_size": size,
                "tp_grain_size": 64,
                "dtype": "bf16",
                "self_check": False,
                "preset_model": "llama",
                "partition_config": RULES,
                "tp": {"tp_group": group, "mpu": mpu},
            }
        )
    )
    theirs = DeepSpeedTraining(**section)
    assert theirs.autotp_size == size
    assert theirs.tensor_parallel.tp_size == max(size, 1)
    assert theirs.tensor_parallel.tp_group is group
    assert theirs.tensor_parallel.mpu is mpu
    assert theirs.get_partition_config_object() is None


def test_what_is_passed_on_is_plain_when_there_is_no_group() -> None:
    section = deepspeed_section({"autotp_size": 4})
    assert section == {"autotp_size": 4, "tp": {"tp_size": 4}}
    assert json.loads(json.dumps(section)) == section
