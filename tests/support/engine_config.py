# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed configurations for the models and tokens of ``small_models``."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

import deepspeed_autotp

# A loss scale that grows every other step, and halves where a gradient is infinite.
FP16_SCALE = {"initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}


@dataclass(frozen=True, slots=True)
class Setting:
    """What one sharded run is made with."""

    tp: int
    zero: int
    clip: float
    precision: str = "fp32"
    accumulate: int = 1
    self_check: bool | str = "auto"
    sequence: bool = False
    length: int = 12


def engine_config(setting: Setting) -> dict[str, Any]:
    """A DeepSpeed configuration for the four rows of :func:`tokens`."""
    world = dist.get_world_size()
    replicas = world // setting.tp
    micro = 4 // replicas // setting.accumulate
    return {
        "train_batch_size": micro * setting.accumulate * world,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": setting.accumulate,
        "gradient_clipping": setting.clip,
        "zero_optimization": {"stage": setting.zero},
        "bf16": {"enabled": setting.precision == "bf16"},
        "fp16": {"enabled": setting.precision == "fp16", **FP16_SCALE},
        "tensor_parallel": {
            "autotp_size": setting.tp,
            "self_check": setting.self_check,
            "sequence_parallel": setting.sequence,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def config_without_section(*, tp: int) -> dict[str, Any]:
    """A DeepSpeed configuration in which nothing speaks of tensor parallelism."""
    config = engine_config(Setting(tp=tp, zero=0, clip=0.0))
    del config["tensor_parallel"]
    return config


def initialize(model: Any, section: dict[str, Any], **more: Any) -> Any:
    config = {"train_micro_batch_size_per_gpu": 1, "tensor_parallel": section, **more}
    return deepspeed_autotp.initialize(model=model, config=config)


def accelerate_config(tp: int, zero: int) -> dict[str, Any]:
    """The configuration of an Accelerate script."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": zero},
    }
    if tp > 1:
        config["tensor_parallel"] = {"autotp_size": tp}
    else:
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return config
