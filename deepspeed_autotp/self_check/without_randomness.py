# SPDX-License-Identifier: Apache-2.0
"""Training without what is random in it, so that two runs can be compared.

Dropout is the identity, and what is drawn has the value in the middle of its distribution, whatever
its shape: a rank draws for its own heads or features, and would draw other numbers than one
process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DROPOUTS = frozenset(
    {
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
        torch.dropout,
        torch.dropout_,
        torch.alpha_dropout,
        torch.alpha_dropout_,
        torch.feature_dropout,
        torch.feature_dropout_,
        torch.feature_alpha_dropout,
        torch.feature_alpha_dropout_,
    }
)
# Where scaled_dot_product_attention takes the probability by position.
_ATTENTION_DROPOUT = 4


class WithoutRandomness(TorchFunctionMode):
    """Within it nothing is random; ``drawn`` is told what dropout would have been applied to, and
    what was drawn otherwise."""

    def __init__(self, drawn: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._drawn = drawn

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func in _DROPOUTS:
            return self._kept(*args, **named)
        if func is F.scaled_dot_product_attention:
            after = args[_ATTENTION_DROPOUT + 1 :]
            if len(args) > _ATTENTION_DROPOUT:
                args = (*args[:_ATTENTION_DROPOUT], 0.0, *after)
            else:
                named["dropout_p"] = 0.0
        result = func(*args, **named)
        if func in _MIDDLES:
            with torch.no_grad():
                result.copy_(_MIDDLES[func](*args, **named))
            self._drawn(result)
        return result

    def _kept(
        self, input: Tensor, p: float = 0.5, training: bool = True, *rest: Any, **options: Any
    ) -> Tensor:
        if p > 0 and options.get("train", training):
            self._drawn(input)
        return input


def _uniform(x: Tensor, from_: float = 0.0, to: float = 1.0, **options: Any) -> Tensor:
    return torch.tensor((options.get("from", from_) + to) / 2)


def _normal(x: Tensor, mean: float = 0.0, std: float = 1.0, **options: Any) -> Tensor:
    return torch.tensor(mean)


def _exponential(x: Tensor, lambd: float = 1.0, **options: Any) -> Tensor:
    return torch.tensor(math.log(2) / lambd)


def _bernoulli(x: Tensor, p: Tensor | float = 0.5, **options: Any) -> Tensor:
    return torch.as_tensor(p) >= 0.5


def _bernoulli_of(input: Tensor, **options: Any) -> Tensor:
    return input >= 0.5


def _half(*size: Any, **options: Any) -> Tensor:
    return torch.tensor(0.5)


def _zero(*size: Any, **options: Any) -> Tensor:
    return torch.tensor(0.0)


# By function, what takes the place of what it draws.
_MIDDLES: Mapping[Any, Callable[..., Tensor]] = {
    torch.rand: _half,
    torch.rand_like: _half,
    torch.randn: _zero,
    torch.randn_like: _zero,
    torch.bernoulli: _bernoulli_of,
    Tensor.bernoulli: _bernoulli_of,
    Tensor.bernoulli_: _bernoulli,
    Tensor.uniform_: _uniform,
    Tensor.normal_: _normal,
    Tensor.exponential_: _exponential,
}
