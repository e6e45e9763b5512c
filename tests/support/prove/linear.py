# SPDX-License-Identifier: Apache-2.0
"""Linear layers as users make them, and call them."""

import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.prove.case import Case


class ScaledLinear(nn.Linear):
    """A class of the user's own that calls what it extends."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def change_linears(model: nn.Module, kind: str) -> None:
    """Linear layers within blocks as others make them."""
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or "." not in name:
            continue
        if kind == "scaled":
            module.__class__ = ScaledLinear
        else:
            nn.utils.parametrizations.weight_norm(module)


def called(case: Case, module: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer gives, or what its weight gives without its forward."""
    if case.linear == "functional" and isinstance(module, nn.Linear):
        return F.linear(x, module.weight, module.bias)
    y: Tensor = module(x)
    return y
