# SPDX-License-Identifier: Apache-2.0
"""Attention that is given something for each head, made outside of it: a position bias."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from deepspeed_autotp.distributed.mappings import take_own
from deepspeed_autotp.layers.linear import Sharding

# What forwards call it. Heads are its third dimension from the end, of an alibi behind the rows of
# the batch in the same dimension.
_ALIBI = "alibi"
_BIASES = (_ALIBI, "position_bias")
# Falcon adds it to the mask, which is for all heads alike elsewhere, and has rows of the batch
# there when it has three dimensions.
_MASKS = ("attention_mask",)
_HEADS = -3
_BIAS_DIMS = 3


class HeadInputs(nn.Module):
    """Attention whose heads are sharded; N is the number of heads, R the ranks.

    bias  [N, Q, K], [B, N, Q, K] or [B * N, Q, K]   replicated, by the name of the argument
    each rank's attention is given [..., N/R, Q, K]; B are the rows of the first argument

    forward   no communication
    backward  all-gather of the gradient of the bias, where it is learned

    A bias of other sizes, as one that the heads of one rank made, passes as it is, and so does an
    alibi [B, Q, K].
    """

    sharding: Sharding

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own: Any = type(self)  # Any: mypy finds no hash in a class of modules
        given = _signature(own).bind(self, *args, **kwargs)
        tensors = {n: v for n, v in given.arguments.items() if isinstance(v, Tensor)}
        rows = next((v.shape[0] for n, v in tensors.items() if n not in _BIASES), 1)
        for name, value in tensors.items():
            if name == _ALIBI and value.dim() == _BIAS_DIMS:
                given.arguments[name] = _own_of_rows(value, rows, self.sharding)
            elif name in _BIASES or (name in _MASKS and value.dim() > _BIAS_DIMS):
                given.arguments[name] = _own_heads(value, self.sharding)
        return super().forward(*given.args[1:], **given.kwargs)


@functools.cache
def _signature(cls: type[Any]) -> inspect.Signature:
    """Of the forward behind :class:`HeadInputs` in ``cls``, with the module as first argument."""
    after = cls.__mro__[cls.__mro__.index(HeadInputs) + 1 :]
    forward = next(vars(c)["forward"] for c in after if "forward" in vars(c))
    return inspect.signature(forward)


def takes_heads(module: nn.Module) -> bool:
    """Whether the forward of ``module`` has such an argument."""
    parameters = inspect.signature(module.forward).parameters
    return any(name in parameters for name in (*_BIASES, *_MASKS))


def _own_heads(bias: Tensor, sharding: Sharding) -> Tensor:
    heads = sharding.parts.size
    if bias.dim() < _BIAS_DIMS:
        return bias
    if bias.shape[_HEADS] == heads:
        own = take_own(bias.movedim(_HEADS, -1), sharding.parts, sharding.group)
        return own.movedim(-1, _HEADS)
    return bias


def _own_of_rows(alibi: Tensor, rows: int, sharding: Sharding) -> Tensor:
    """Of [rows * N, Q, K] or [N, Q, K]; as many rows as heads are taken for rows."""
    heads = sharding.parts.size
    if alibi.shape[0] == rows * heads:
        return _own_heads(alibi.unflatten(0, (rows, heads)), sharding).flatten(0, 1)
    return alibi if alibi.shape[0] == rows else _own_heads(alibi, sharding)
