# SPDX-License-Identifier: Apache-2.0
"""Engines of DeepSpeed whose gradient norm is not known are refused by name."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from deepspeed_autotp.interop.deepspeed.grad_norm import count_weights_once

pytestmark = pytest.mark.usefixtures("deepspeed_imported")


def refusal(optimizer: Any, *, module: nn.Module | None = None) -> str:
    engine = SimpleNamespace(optimizer=optimizer, module=module or nn.Identity())
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
    from deepspeed.moe.layer import MoE

    layer = MoE.__new__(MoE)  # whose own __init__ wants process groups
    nn.Module.__init__(layer)
    optimizer = torch.optim.SGD([torch.ones(1)])
    assert "deepspeed.moe" in refusal(optimizer, module=nn.Sequential(layer))
