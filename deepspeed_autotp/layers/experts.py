# SPDX-License-Identifier: Apache-2.0
"""Modules around sharded weights that are not layers themselves.

Each is mixed into the class of the module that it stands for: what it calls as
``super().forward`` is that module's own forward, on its own shards. T is the number of tokens,
H the hidden size, K the experts per token, R the ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp.distributed.mappings import (
    copy_to_ranks,
    gather_parts,
    sum_over_ranks,
    take_own,
)
from deepspeed_autotp.layers.attention import HeadInputs
from deepspeed_autotp.layers.linear import Sharding


class Experts(nn.Module):
    """Experts whose inner features are sharded; every rank runs its part of every expert.

    x  [T, H]   replicated, with routing indices [T, K] and routing weights [T, K]
    y  [T, H]   = sum over ranks of the own part

    forward   all-reduce of the output
    backward  all-reduce of the gradients of x and of the routing weights

    A bias of the output is whole on every rank, and each adds its R-th part.
    """

    sharding: Sharding

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        group = self.sharding.group
        args = tuple(_shared(value, self.sharding) for value in args)
        kwargs = {key: _shared(value, self.sharding) for key, value in kwargs.items()}
        return sum_over_ranks(super().forward(*args, **kwargs), group)


class ExpertsColumn(nn.Module):
    """One layer of all experts, whose output features are sharded.

    x  [T, I]     replicated
    y  [T, O/R]   = own forward of x

    forward   no communication
    backward  all-reduce of dx
    """

    sharding: Sharding

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_shared(value, self.sharding) for value in args)
        kwargs = {key: _shared(value, self.sharding) for key, value in kwargs.items()}
        return super().forward(*args, **kwargs)


class ExpertsRow(nn.Module):
    """One layer of all experts, whose input features are sharded.

    x  [T, I/R]   this rank's part
    y  [T, O]     = sum over ranks of own forward of x

    forward   all-reduce of the output
    backward  no communication
    """

    sharding: Sharding

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return sum_over_ranks(super().forward(*args, **kwargs), self.sharding.group)


class Share(nn.Module):
    """A module inside of experts that each rank runs whole: each gives its R-th part.

    x  [T, H]   replicated
    y  [T, H]   = own forward of x / R

    forward   no communication: the experts sum
    backward  no communication: the experts sum
    """

    sharding: Sharding

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) / self.sharding.group.size


class SharedRope(nn.Module):
    """The projection of latent attention whose last features go to every head as they are.

    y  [T, L + P]   the latent L, which a column layer reads, and the rope part P, which all
                    heads read; ``sharding.parts.size`` is L + P, its one run the rope part

    forward   no communication
    backward  all-reduce of the gradient of the rope part: each rank's heads give a part of it
    """

    sharding: Sharding

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = self.sharding
        y = super().forward(*args, **kwargs)
        start, length = own.parts.runs[0]
        latent, rope = y.split([start, length], dim=-1)
        return torch.cat([latent, copy_to_ranks(rope, own.group)], dim=-1)


class WholeNorm(nn.Module):
    """A norm over features of which each rank holds a part; its weight is whole.

    x  [T, F/R]   this rank's part
    y  [T, F/R]   = own part of norm(x of all ranks)

    forward   all-gather of x
    backward  all-gather of dy
    """

    sharding: Sharding

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        own = self.sharding
        whole = super().forward(gather_parts(x, own.parts, own.group), *args, **kwargs)
        return take_own(whole, own.parts, own.group)


def _shared(value: Any, sharding: Sharding) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return copy_to_ranks(value, sharding.group)
    return value


BLOCKS: dict[str, type[nn.Module]] = {
    "experts": Experts,
    "experts column": ExpertsColumn,
    "experts row": ExpertsRow,
    "share": Share,
    "rope": SharedRope,
    "norm": WholeNorm,
    "heads": HeadInputs,
}


def block_class(
    module: nn.Module, kind: str, *, divided: Sequence[str] = (), ranks: int = 1
) -> type[nn.Module]:
    """The class that ``module`` takes as a block of ``kind``, with its own forward inside.

    Parameters whose names are ``divided`` read as their ``ranks``-th part.
    """
    block: Any = BLOCKS[kind]  # Any: mypy finds no hash in a class of modules
    own: Any = type(module)
    return _combined(block, own, tuple(divided), ranks)


@functools.cache
def _combined(
    block: type[Any], own: type[Any], divided: tuple[str, ...], ranks: int
) -> type[nn.Module]:
    """One class for all blocks alike, so that what is compiled for one serves the others."""
    shares = {name: property(_share(name, ranks)) for name in divided}
    return type(f"{block.__name__}Of{own.__name__}", (block, own), shares)


def _share(name: str, ranks: int) -> Callable[[nn.Module], Tensor | None]:
    def share(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[name]
        return None if parameter is None else parameter / ranks

    return share
