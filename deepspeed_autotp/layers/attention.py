# SPDX-License-Identifier: Apache-2.0
"""Modules of attention whose heads are sharded: a per-head position bias, and shared rope.

Each is mixed into the class of the module it replaces: ``super().forward`` is that module's own
forward, on its own shards.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp.distributed.autograd_collectives import (
    copy_to_tp_region,
    scatter_to_tp_region,
)
from deepspeed_autotp.layers.layer_sharding import LayerSharding, sharding_of

# Names of the argument. Heads are the third dimension from the end; an alibi may have them in one
# dimension with the rows of the batch, behind these.
_ALIBI = "alibi"
_BIASES = (_ALIBI, "position_bias")
# Falcon adds the bias to the mask, which has no heads elsewhere, and has the rows of the batch in
# that dimension when it has three.
_MASKS = ("attention_mask",)
_HEADS = -3
_BIAS_DIMS = 3


class PerHeadBias(nn.Module):
    """Attention that is given a bias for each head, made outside of it.

    bias  [N, Q, K], [B, N, Q, K] or [B * N, Q, K]   replicated, by the name of the argument
    each rank's attention is given [..., N/R, Q, K]; B are the rows of the first argument, N the
    heads, R the ranks

    forward   no communication
    backward  all-gather of the gradient of the bias, where it is learned

    A bias of other sizes, as one that the heads of one rank made, passes unchanged, and so does an
    alibi [B, Q, K].
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sharding = sharding_of(self)
        own: Any = type(self)  # Any: mypy finds no hash in a class of modules
        given = _signature(own).bind(self, *args, **kwargs)
        tensors = {n: v for n, v in given.arguments.items() if isinstance(v, Tensor)}
        rows = next((v.shape[0] for n, v in tensors.items() if n not in _BIASES), 1)
        for name, value in tensors.items():
            if name == _ALIBI and value.dim() == _BIAS_DIMS:
                given.arguments[name] = _local_alibi(value, rows, sharding)
            elif name in _BIASES or (name in _MASKS and value.dim() > _BIAS_DIMS):
                given.arguments[name] = _local_heads(value, sharding)
        return super().forward(*given.args[1:], **given.kwargs)


@functools.cache
def _signature(cls: type[Any]) -> inspect.Signature:
    """Of the forward behind :class:`PerHeadBias` in ``cls``, with the module as first argument."""
    after = cls.__mro__[cls.__mro__.index(PerHeadBias) + 1 :]
    forward = next(vars(c)["forward"] for c in after if "forward" in vars(c))
    return inspect.signature(forward)


def takes_per_head_bias(module: nn.Module) -> bool:
    """Whether the forward of ``module`` has such an argument."""
    parameters = inspect.signature(module.forward).parameters
    return any(name in parameters for name in (*_BIASES, *_MASKS))


def _local_heads(bias: Tensor, sharding: LayerSharding) -> Tensor:
    if bias.dim() < _BIAS_DIMS:
        return bias
    if bias.shape[_HEADS] == sharding.layout.size:
        local = scatter_to_tp_region(bias.movedim(_HEADS, -1), sharding.layout, sharding.group)
        return local.movedim(-1, _HEADS)
    return bias


def _local_alibi(alibi: Tensor, rows: int, sharding: LayerSharding) -> Tensor:
    """Of [rows * N, Q, K] or [N, Q, K]; where there are as many rows as heads, of the former."""
    heads = sharding.layout.size
    if alibi.shape[0] == rows * heads:
        return _local_heads(alibi.unflatten(0, (rows, heads)), sharding).flatten(0, 1)
    return alibi if alibi.shape[0] == rows else _local_heads(alibi, sharding)


class ReplicatedRope(nn.Module):
    """The projection of latent attention (MLA) whose last features all heads read.

    y  [T, L + P]   the latent L, which a column layer reads, and the rope features P, which all
                    heads read; ``layout.size`` is L + P, its one run the rope features

    forward   no communication
    backward  all-reduce of the gradient of the rope features, which each rank's heads add to
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(*args, **kwargs)
        s = sharding_of(self)
        start, length = s.layout.runs[0]
        latent, rope = y.split([start, length], dim=-1)
        return torch.cat([latent, copy_to_tp_region(rope, s.group)], dim=-1)
