# SPDX-License-Identifier: Apache-2.0
"""Modules of mixture-of-experts blocks.

Each is mixed into the class of the module it replaces: ``super().forward`` is that module's own
forward, on its own shards. T is the number of tokens, H the hidden size, K the experts per token, I
and O input and output features, R the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp.distributed.autograd_collectives import (
    copy_to_tp_region,
    gather_from_tp_region,
    reduce_from_tp_region,
    scatter_to_tp_region,
)
from deepspeed_autotp.distributed.rng_observation import first_tensor, run_without_draws
from deepspeed_autotp.interop.live_bytes import has_no_values
from deepspeed_autotp.layers.drawn_weights import DrawnInFull
from deepspeed_autotp.layers.layer_sharding import LayerSharding, sharding_of


class Experts(DrawnInFull):
    """Experts whose inner features are sharded; every rank runs its shard of every expert.

    x  [T, H]   replicated, with routing indices [T, K] and routing weights [T, K]
    y  [T, H]   = sum over ranks of own forward of x

    forward   all-reduce of the output
    backward  all-reduce of the gradients of x and of the routing weights

    A bias of the output is replicated, and divided by R on each rank.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        s = sharding_of(self)
        args, kwargs = _copied_to_region(args, kwargs, s)
        y = _run(super().forward, args, kwargs, s)
        return reduce_from_tp_region(y, s.group)


class WholeExperts(DrawnInFull):
    """Experts of which every rank has some, and runs those for the tokens that name them.

    x  [T, H]   replicated, with routing indices [T, K] and routing weights [T, K]
    y  [T, H]   = sum over ranks, and over the N pairs of a token and an own expert, of own forward
                of these tokens [N, H], with indices [N, 1] and weights [N, 1]

    forward   all-reduce of the output
    backward  all-reduce of the gradients of x and of the routing weights
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        s = sharding_of(self)
        args, kwargs = _copied_to_region(args, kwargs, s)
        x, index, weights = _routed(args, kwargs)
        start, count = s.layout.runs[s.group.rank]
        own = index - start
        token, place = _own_pairs(own, count, s.layout.size)
        pairs = {x: x[token], index: own[token, place, None], weights: weights[token, place, None]}
        if len(token) == 0 < len(x):  # a rank without any takes part in the backward's collectives
            token, one = token.new_zeros(1), index.new_zeros(1, 1)
            # Zeros and no products, which would be NaN of what is infinite.
            pairs = {x: _zeros(x[:1]), index: one, weights: _zeros(weights[:1, :1])}
        args, kwargs = _replaced(args, kwargs, pairs)
        y = _run(super().forward, args, kwargs, s)
        # In 16 bits every sum would round.
        total = torch.zeros(
            x.shape, dtype=torch.promote_types(y.dtype, torch.float32), device=x.device
        )
        total = total.index_add(0, token, y.to(total.dtype))
        return reduce_from_tp_region(total.to(y.dtype), s.group)


class WholeExpertBlocks(DrawnInFull):
    """Experts of which every rank has some, and which are each given a block of rows.

    x  [E*T, H]   replicated: T rows for each of E experts, in their order
    y  [E*T, H]   = the ranks' own forwards of the blocks of their own experts, gathered

    forward   all-gather of the output
    backward  all-gather of dx
    """

    def forward(self, x: Tensor, /) -> Tensor:
        s = sharding_of(self)
        blocks = scatter_to_tp_region(_blocks(x, s.layout.size), s.layout, s.group, dim=0)
        y = _run(super().forward, (blocks.flatten(0, 1),), {}, s)
        y = _blocks(y, blocks.shape[0])
        return gather_from_tp_region(y, s.layout, s.group, dim=0).flatten(0, 1)


class ExpertsColumn(DrawnInFull):
    """One layer of all experts, whose output features are sharded.

    x  [T, I]     replicated
    y  [T, O/R]   = own forward of x

    forward   no communication
    backward  all-reduce of dx
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        s = sharding_of(self)
        args, kwargs = _copied_to_region(args, kwargs, s)
        s.enter_region(first_tensor(args, kwargs))
        return super().forward(*args, **kwargs)


class ExpertsRow(DrawnInFull):
    """One layer of all experts, whose input features are sharded.

    x  [T, I/R]   this rank's shard
    y  [T, O]     = sum over ranks of own forward of x

    forward   all-reduce of the output
    backward  no communication
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        s = sharding_of(self)
        s.leave_region()
        return reduce_from_tp_region(super().forward(*args, **kwargs), s.group)


class ReplicatedInExperts(nn.Module):
    """A replicated module inside of experts, whose outputs are summed: divided by R.

    x  [T, H]   replicated
    y  [T, H]   = own forward of x / R

    forward   no communication: the experts sum
    backward  no communication: the experts sum
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) / sharding_of(self).group.size


def _run(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sharding: LayerSharding,
) -> Any:
    """The own forward of experts, which must draw no random numbers."""
    if sharding.context.rng.is_active:
        return run_without_draws(forward, args, kwargs)
    return forward(*args, **kwargs)


def _copied_to_region(
    args: tuple[Any, ...], kwargs: dict[str, Any], sharding: LayerSharding
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def copied(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return copy_to_tp_region(value, sharding.group)
        return value

    return tuple(map(copied, args)), {key: copied(value) for key, value in kwargs.items()}


def _own_pairs(own: Tensor, count: int, experts: int) -> tuple[Tensor, Tensor]:
    """Tokens and places in ``own [T, K]`` that name one of the first ``count`` experts. Without
    values the number of them that there is where all ``experts`` are named equally often."""
    if has_no_values(own):
        pairs = own.new_zeros(-(-own.numel() * count // experts))
        return pairs, pairs.clone()
    token, place = ((own >= 0) & (own < count)).nonzero(as_tuple=True)
    return token, place


def _blocks(x: Tensor, experts: int) -> Tensor:
    """``[experts * T, H] -> [experts, T, H]``"""
    return x.view(experts, x.shape[0] // experts, x.shape[-1])


def _routed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, routing indices and routing weights of the arguments of experts: the first is that of
    the tokens."""
    given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    indices = [v for v in given if not v.is_floating_point()]
    floats = [v for v in given if v.is_floating_point()]
    if len(indices) == 1 and len(floats) == 2:
        (index,), (tokens, weights) = indices, floats
        if index.shape == weights.shape and tokens.shape[:-1] == index.shape[:-1]:
            return tokens, index, weights
    raise ValueError(
        "tensor_parallel.expert_partition: got experts that are given "
        f"{', '.join(str(list(v.shape)) for v in given) or 'nothing'}, expected tokens [T, H], "
        "routing indices [T, K] and routing weights [T, K]; write 'width'"
    )


def _zeros(x: Tensor) -> Tensor:
    """Zeros with a gradient of zeros, whatever is in ``x``."""
    return x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0)


def _replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], values: Mapping[Tensor, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def value_of(given: Any) -> Any:
        return values.get(given, given) if isinstance(given, Tensor) else given

    return tuple(map(value_of, args)), {key: value_of(given) for key, given in kwargs.items()}
