# SPDX-License-Identifier: Apache-2.0
"""A norm between the last layer of a stack and the output head, on this rank's own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from deepspeed_autotp.distributed.gradient_sum import GradientSum, with_summed_gradient
from deepspeed_autotp.distributed.lazy_sequence import gather_later, own_tokens
from deepspeed_autotp.interop.live_bytes import real_tensors
from deepspeed_autotp.interop.torch_private import own_parameters


class NormOfOwnTokens(nn.Module):
    """Mixed into the class of a norm, which takes tokens one by one.

    x  [N, H]   a LazySequence, of which the norm's own forward is given the shard; or a tensor, or
                one of several arguments, which may have a value for each token, too
    y  [N, H]   as x

    backward  an all-reduce of the gradient of each parameter, in float32
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        lazy = own_tokens(given[0]) if len(given) == 1 else None
        if lazy is None:
            return super().forward(*args, **kwargs)
        named = dict.fromkeys(kwargs, lazy.shard)
        over_all = GradientSum(lazy.group)
        with _with_parameters(self, lambda p: with_summed_gradient(p, over_all)):
            y = super().forward(*(() if named else (lazy.shard,)), **named)
        return gather_later(y, lazy.layout_of_shard, lazy.group)


@contextmanager
def _with_parameters(module: nn.Module, changed: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A context in which ``module`` itself has its parameters changed."""
    parameters = cast(dict[str, Any], own_parameters(module))
    before = dict(parameters)
    try:
        parameters.update({name: changed(p) for name, p in before.items() if p is not None})
        yield
    finally:
        parameters.update(before)


@torch.no_grad()
def takes_tokens_one_by_one(norm: nn.Module, *, features: int) -> bool:
    """Whether ``norm`` gives the same for a token whatever the others are, in any shape, and
    remembers nothing. Its own forward is called with other values for its parameters."""
    if any(True for _ in norm.buffers()):
        return False
    with real_tensors():
        return _is_equal_token_by_token(norm, features)


def _is_equal_token_by_token(norm: nn.Module, features: int) -> bool:
    draw = torch.Generator().manual_seed(0)
    as_drawn: dict[str, Any] = {"generator": draw, "device": "cpu", "dtype": torch.float32}
    x = torch.randn(2, 3, features, **as_drawn)
    x *= torch.arange(1.0, 7, device="cpu").view(2, 3, 1)  # tokens unlike each other
    rows = x.flatten(0, 1).unsqueeze(0)
    try:
        with _with_parameters(norm, lambda p: torch.rand(p.shape, **as_drawn)):
            y, every, some, last = (
                type(norm).forward(norm, each) for each in (x, rows, rows[:, :2], rows[:, 5:])
            )
        pairs = ((every, y.view_as(rows)), (some, every[:, :2]), (last, every[:, 5:]))
        return all(torch.allclose(own, full, rtol=1e-4, atol=1e-5) for own, full in pairs)
    except Exception:  # of code that is not ours, such as a kernel for GPUs
        return False
