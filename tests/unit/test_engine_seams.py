# SPDX-License-Identifier: Apache-2.0
"""Engines of DeepSpeed whose gradient norm is not known are refused by name."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepspeed_autotp.interop.deepspeed.grad_norm import count_weights_once


def refusal(optimizer: Any, *, has_moe_layers: bool = False) -> str:
    engine = SimpleNamespace(optimizer=optimizer, has_moe_layers=has_moe_layers)
    unused: Any = None
    with pytest.raises(ValueError, match="initialize: ") as caught:
        count_weights_once(engine, unused, clip=lambda most: torch.zeros(()))
    return str(caught.value)


class ZenFlowZeroOptimizerSequential:
    pass


class BF16_Optimizer:
    bf16_groups: tuple[()] = ()


def test_an_optimizer_that_is_not_known_is_refused() -> None:
    text = refusal(ZenFlowZeroOptimizerSequential())
    assert "ZenFlowZeroOptimizerSequential" in text and "0.19.8" in text and "found" in text


def test_a_known_optimizer_without_what_is_replaced_is_refused() -> None:
    text = refusal(BF16_Optimizer())
    assert "without its get_grads_for_norm" in text and "bf16_groups" not in text


def test_layers_of_deepspeed_moe_are_refused() -> None:
    assert "deepspeed.moe" in refusal(torch.optim.SGD([torch.ones(1)]), has_moe_layers=True)
