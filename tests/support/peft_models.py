# SPDX-License-Identifier: Apache-2.0
"""Small models with PEFT's adapters, sharded or not, and how far their training is apart."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.training_loops import apart, make, train_sharded, train_unsharded


def llama(**changes: Any) -> nn.Module:
    return make(num_key_value_heads=1, **changes)


def lora(model: nn.Module, seed: int = 3, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    known = {"r": 5, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**{**known, **options}))  # type: ignore[arg-type]


def sharded(model: nn.Module) -> nn.Module:
    return deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())


def largest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert list(one) == list(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def trained(what: str, unsharded: nn.Module, model: nn.Module) -> dict[str, float]:
    found = apart(unsharded, model, (train_unsharded(unsharded), train_sharded(model)))
    return {f"{what}: {key}": value for key, value in found.items()}
