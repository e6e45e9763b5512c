# SPDX-License-Identifier: Apache-2.0
"""Modules of mixture-of-experts blocks.

Each is mixed into the class of the module it replaces: ``super().forward`` is that module's own
forward, on its own shards. T is the number of tokens, H the hidden size, K the experts per token, I
and O input and output features, R the ranks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deepspeed_autotp.distributed.autograd_collectives import (
    copy_to_tp_region,
    reduce_from_tp_region,
)
from deepspeed_autotp.distributed.rng_observation import first_tensor, run_without_draws
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
        if s.context.rng.is_active:
            y = run_without_draws(super().forward, args, kwargs)
        else:
            y = super().forward(*args, **kwargs)
        return reduce_from_tp_region(y, s.group)


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


def _copied_to_region(
    args: tuple[Any, ...], kwargs: dict[str, Any], sharding: LayerSharding
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def copied(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return copy_to_tp_region(value, sharding.group)
        return value

    return tuple(map(copied, args)), {key: copied(value) for key, value in kwargs.items()}
