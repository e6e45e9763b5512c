# SPDX-License-Identifier: Apache-2.0
"""Recording and merging over ranks."""

import copy
from typing import Any

import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from tests.support.engine_config import config_without_section
from tests.support.log_records import logged_warnings
from tests.support.loss_curves import sgd, single_losses, train_engine, worst_difference
from tests.support.model_snapshot import refusal
from tests.support.mpu import Mpu
from tests.support.small_models import build

STEPS = 3
TWO = {"autotp_size": 2}


def make_groups() -> tuple[list[int], dict[str, Any]]:
    """The ranks of the group that was made, and the section that was filled."""
    from deepspeed.utils import groups

    model = nn.Linear(4, 4)
    deepspeed_autotp.tp_model_init(model, 2, "fp32")
    config: dict[str, Any] = {}
    deepspeed_autotp.merge_tp_model_init_into_config(config, None, None, dist)
    made = groups.get_tensor_model_parallel_group()
    return dist.get_process_group_ranks(made), config["tensor_parallel"]


class Around(nn.Module):
    """A model with a value head, as in reinforcement learning."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


def records_of_models() -> dict[str, int | None]:
    """The TP size that initialize uses for models related to a recorded one."""
    columns = {"patterns": [r".*(up|gate)_proj"], "partition_type": "column"}
    down = {"patterns": [r".*down_proj"], "partition_type": "row"}
    section = {"partition_config": {"layer_specs": [columns, down], "use_default_specs": False}}

    def tp_size(recorded: nn.Module, model: nn.Module) -> int | None:
        deepspeed_autotp.reset()
        deepspeed_autotp.tp_model_init(recorded, 2, "fp32")
        return _tp_size(model, section)

    # DeepSpeed cannot go back to engines without tensor parallelism: these come first.
    found: dict[str, int | None] = {}
    model = build("llama", tied=False)
    reference = build("llama", tied=False)
    found["another"] = tp_size(reference, model)
    deepspeed_autotp.reset()
    deepspeed_autotp.tp_model_init(model, 2, "fp32")
    deepspeed_autotp.reset()
    found["after reset"] = _tp_size(model, section)
    model = build("llama", tied=False)
    found["itself"] = tp_size(model, model)
    model = build("llama", tied=False)
    found["around it"] = tp_size(model, Around(model))
    model = build("llama", tied=False)
    found["inside it"] = tp_size(Around(model), model)
    return found


def _tp_size(model: nn.Module, section: dict[str, Any]) -> int | None:
    config = {"train_micro_batch_size_per_gpu": 1, "tensor_parallel": section}
    given = copy.deepcopy(config)
    engine, *_ = deepspeed_autotp.initialize(model=model, config=config)
    assert config == given
    try:
        return deepspeed_autotp.tensor_parallel(engine).group.size
    except ValueError:
        return None


def warnings_for_another_model() -> list[str]:
    """Warnings of initialize for a model beside the recorded one."""
    reference = build("llama", tied=False)
    deepspeed_autotp.tp_model_init(reference, 2, "fp32")
    with logged_warnings() as texts:
        _tp_size(build("llama", tied=False), {})
    return texts


def conflicts_in_initialize(kind: str) -> str:
    model = build("llama", tied=False)
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
    group = dist.group.WORLD if kind == "mpu" else None
    deepspeed_autotp.tp_model_init(model, 2, "fp32", tp_group=group)
    if kind == "size":
        config["tensor_parallel"] = {"autotp_size": 1}
    elif kind == "dtype":
        config["bf16"] = {"enabled": True}
    mpu = Mpu(group) if kind == "mpu" else None
    given = copy.deepcopy(config)
    text = refusal(model, lambda: deepspeed_autotp.initialize(model=model, config=config, mpu=mpu))
    assert config == given
    return text


def train_with_group() -> float:
    """Worst loss difference with a recorded group of one's own."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    expected = single_losses(build("llama", tied=False), clip=0.0, steps=STEPS)
    model = build("llama", tied=False)
    deepspeed_autotp.tp_model_init(model, 2, "fp32", tp_group=pairs[dist.get_rank() // 2])
    engine, *_ = deepspeed_autotp.initialize(
        model=model, optimizer=sgd(model), config=config_without_section(tp=2)
    )
    return worst_difference(train_engine(engine, tp=2, steps=STEPS), expected)


def record_on_one_rank() -> str:
    model = build("llama", tied=False)
    if dist.get_rank() == 0:
        deepspeed_autotp.tp_model_init(model, 2, "fp32")
    config = {"train_micro_batch_size_per_gpu": 1}
    return refusal(model, lambda: deepspeed_autotp.initialize(model=model, config=config))


def recorded_with_deepspeed() -> str:
    import deepspeed
    import torch

    model = build("llama", tied=False)
    deepspeed.tp_model_init(model, 2, torch.float32)
    config = {"train_micro_batch_size_per_gpu": 1}
    return refusal(model, lambda: deepspeed_autotp.initialize(model=model, config=config))


def second_engine(size: int) -> str:
    """Another TP size after an engine of TP size 2."""
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
    first = build("llama", tied=False)
    deepspeed_autotp.initialize(model=first, config={**config, "tensor_parallel": TWO})
    model = build("llama", tied=False)
    config["tensor_parallel"] = {"autotp_size": size}
    return refusal(model, lambda: deepspeed_autotp.initialize(model=model, config=config))
