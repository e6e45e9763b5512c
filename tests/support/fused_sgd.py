# SPDX-License-Identifier: Apache-2.0
"""Plain SGD that DeepSpeed takes for its FusedAdam."""

import torch
from torch import nn

from tests.support.loss_curves import RATE


def fused_sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain SGD that DeepSpeed wraps as it does its FusedAdam, whose kernel takes minutes to be
    compiled for a CPU."""
    from deepspeed.ops.adam import FusedAdam

    class FusedSGD(FusedAdam):  # type: ignore[misc]
        def __init__(self) -> None:
            torch.optim.Optimizer.__init__(self, parameters, {"lr": RATE})

        @torch.no_grad()
        def step(self, *_: object) -> None:
            for parameter in (p for group in self.param_groups for p in group["params"]):
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=RATE)

        def zero_grad(self, set_to_none: bool = True) -> None:
            torch.optim.Optimizer.zero_grad(self, set_to_none)

    return FusedSGD()
