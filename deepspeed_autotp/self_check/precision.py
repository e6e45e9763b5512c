# SPDX-License-Identifier: Apache-2.0
"""Running a model in float32 whatever the data type of its weights, or with other rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deepspeed_autotp.interop.torch_private import submodules
from deepspeed_autotp.sharding.conversion import replace_data

_16_BIT = (torch.bfloat16, torch.float16)


def is_16_bit(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them is."""
    return any(t.dtype in _16_BIT for t in tensors)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within it, all parameters and buffers that have 16 bits have copies of 32 as their data."""
    before = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.dtype in _16_BIT]
    try:
        for tensor, data in before:
            _give(tensor, data.float())
        yield
    finally:
        for tensor, data in before:
            _give(tensor, data)


def _give(tensor: Tensor, data: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        replace_data(tensor, data)
    else:
        tensor.data = data


@contextmanager
def rounded_otherwise(model: nn.Module) -> Iterator[None]:
    """Within it, the outputs of modules without children are one unit in the last place larger or
    smaller, as if all that leads there were rounded in other places."""
    draw = torch.Generator().manual_seed(7)

    def hook(module: nn.Module, args: object, output: object) -> object:
        if not isinstance(output, Tensor) or output.dtype not in _16_BIT:
            return None
        signs = torch.randint(0, 2, output.shape, generator=draw) * 2 - 1
        return output * (1 + signs * torch.finfo(output.dtype).eps).to(output)

    leaves = [module for module in model.modules() if not submodules(module)]
    hooks = [module.register_forward_hook(hook) for module in leaves]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
