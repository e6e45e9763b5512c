# SPDX-License-Identifier: Apache-2.0
"""Sharded layers whose weights are drawn anew: an error, unless they are full for now.

Every rank would draw the same values for its shard, and with a scale of the shard's sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from deepspeed_autotp.interop.torch_private import own_parameters
from deepspeed_autotp.layers.layer_sharding import sharding_of

_DRAWS: frozenset[Any] = frozenset(
    [
        *(Tensor.bernoulli_, Tensor.cauchy_, Tensor.exponential_, Tensor.geometric_),
        *(Tensor.log_normal_, Tensor.normal_, Tensor.random_, Tensor.uniform_),
        *(torch.bernoulli, torch.normal, torch.rand, torch.rand_like, torch.randint),
        *(torch.randn, torch.randn_like, torch.randperm),
        # What torch calls as one function.
        *(init.kaiming_normal_, init.kaiming_uniform_, init.normal_, init.uniform_),
    ]
)
_DATA: Any = Tensor.data
_WRITES: frozenset[Any] = frozenset(
    [
        *(Tensor.add_, Tensor.addcdiv_, Tensor.addcmul_, Tensor.copy_, Tensor.div_),
        *(Tensor.lerp_, Tensor.mul_, Tensor.set_, Tensor.sub_),
        *(Tensor.__setitem__, _DATA.__set__),
    ]
)


class DrawnInFull(nn.Module):
    """Mixed into sharded layers: a function that ``apply`` is given may draw values for its
    parameters while these are full, as in ``gather_params``; or else it is a RuntimeError on each
    rank."""

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        with _NoDraws(self):
            return super().apply(fn)


class ResetInFull(DrawnInFull):
    """The same of the ``reset_parameters`` that a layer has."""

    def reset_parameters(self) -> None:
        if _shards(self):
            raise RuntimeError(_drawn(self, "reset_parameters"))
        super().reset_parameters()  # type: ignore[misc]


class _NoDraws(TorchFunctionMode):
    """RuntimeError for a draw into a shard of ``module``, or a write of what may have been
    drawn."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._has_drawn = False
        # An empty shard has no memory: it is the same whatever is drawn.
        self._memory = {_memory(shard) for shard in _shards(module)} - {0}

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._memory and (func in _DRAWS or (self._has_drawn and func in _WRITES)):
            self._has_drawn = True
            into = args[0] if args else kwargs.get("tensor")
            others = [each for each in args[1:] if isinstance(each, Tensor) and each.dim() > 0]
            is_drawn = func in _DRAWS or bool(others)  # a shard may be scaled by a number
            if is_drawn and isinstance(into, Tensor) and _memory(into) in self._memory:
                raise RuntimeError(_drawn(self._module, func.__name__))
        return func(*args, **kwargs)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _shards(module: nn.Module) -> list[Tensor]:
    """The parameters of the layer itself that are shards now."""
    shapes = sharding_of(module).local_shapes
    own = own_parameters(module)
    found = [(own.get(name), shape) for name, shape in shapes.items()]
    return [p for p, shape in found if p is not None and p.shape == shape]


def _drawn(module: nn.Module, called: str) -> str:
    return (
        f"{called}: got a weight of a sharded {type(module).__name__}, for which every rank would "
        "draw the same values, expected a full one; draw new weights within "
        "deepspeed_autotp.gather_params(model, modifier_rank=0)"
    )
