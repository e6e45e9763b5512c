# SPDX-License-Identifier: Apache-2.0
"""A model at one moment, to show later that nothing about it has changed."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)


class Snapshot:
    """Classes, attributes, hooks, modes, and every tensor bit by bit with its place in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [_of_module(module) for module in model.modules()]
        self._tensors = [_of_tensor(t) for t in _tensors(model)]
        self._values = [t.detach().clone() for t in _tensors(model)]

    def check(self) -> None:
        """AssertionError where anything differs now."""
        model = self._model
        for before, now in zip(self._modules, map(_of_module, model.modules()), strict=True):
            assert before == now
        for old, tensor in zip(self._tensors, _tensors(model), strict=True):
            assert old == _of_tensor(tensor)
        for value, tensor in zip(self._values, _tensors(model), strict=True):
            assert _bits(value) == _bits(tensor)


def refusal(model: nn.Module, call: Callable[[], Any]) -> str:
    """What ``call`` raises, as "type: message"; ``model`` must be as it was before."""
    before = Snapshot(model)
    numbers = torch.get_rng_state()
    try:
        call()
    except Exception as error:
        before.check()
        assert torch.equal(numbers, torch.get_rng_state()), "random numbers were drawn"
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _bits(tensor: torch.Tensor) -> bytes:
    if tensor.is_meta:
        return b""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def _of_tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    hooks = len(tensor._backward_hooks or {})
    place = None if tensor.is_meta else tensor.data_ptr()
    own = sorted(vars(tensor))
    return id(tensor), place, tensor.shape, tensor.stride(), tensor.requires_grad, hooks, own


def _of_module(module: nn.Module) -> tuple[Any, ...]:
    held = vars(module)
    plain = {
        key: value if isinstance(value, int | float | str | type(None)) else id(value)
        for key, value in held.items()
    }
    hooks = {key: list(held[key].values()) for key in _HOOKS}
    members = {
        key: {name: id(value) for name, value in held[key].items()}
        for key in ("_parameters", "_buffers", "_modules")
    }
    assert isinstance(held["_forward_hooks"], OrderedDict)
    return type(module), plain, hooks, members, module.training
