# SPDX-License-Identifier: Apache-2.0
"""Which ranks have the weights of a model before it is sharded: all, TP rank 0 of each group, or
none, where they are read from files.

The others then have built it under ``torch.device("meta")``: names, shapes and data types, but no
values. Every rank gets the same answer; what is neither is refused on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from deepspeed_autotp.distributed.hosts import Host, this_host
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.deepspeed.parameters import is_partitioned
from deepspeed_autotp.planning.model_description import Description

# How many ranks an error lists.
_NAMED = 8


@dataclass(frozen=True, slots=True)
class WeightLocation:
    """``device`` has the weights, or is to have those of a rank without any.

    ``only_on_rank0``: only TP rank 0 of each group has them. ``in_files``: no rank has them, and
    each reads its own shards.
    """

    device: torch.device
    only_on_rank0: bool
    in_files: bool = False

    @property
    def on_every_rank(self) -> bool:
        return not (self.only_on_rank0 or self.in_files)


@dataclass(frozen=True, slots=True)
class RankReport:
    """What a rank tells the others of itself and its weights."""

    rank: int
    host: Host
    device: str
    partitioned: bool

    @property
    def has_none(self) -> bool:
        return self.device == "meta"


def report(description: Description) -> RankReport:
    """What this rank has."""
    return RankReport(
        rank=dist.get_rank(),
        host=this_host(),
        device=description.parameters[0].device.type,
        partitioned=any(is_partitioned(p) for p in description.parameters),
    )


def locate_weights(
    description: Description, group: TPGroup, reports: Sequence[RankReport]
) -> WeightLocation:
    """Who has the weights, on every rank; ``reports`` are those that were not refused."""
    own = description.parameters[0].device
    if not any(each.has_none for each in reports):
        return WeightLocation(own, only_on_rank0=False)
    (kind,) = {each.device for each in reports if each.rank == group.global_ranks[0]}
    if group.rank == 0:
        return WeightLocation(own, only_on_rank0=True)
    place = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else kind
    return WeightLocation(torch.device(place), only_on_rank0=True)


def refuse_unlike(reports: Sequence[RankReport], tp_size: int) -> None:
    """ValueError on every rank where some weights are on the meta device and others would have to
    be. ``reports`` are those of all ranks, one TP group after the other.

    Before a process group is made: a rank that closes one at once breaks the connections of those
    that are still making it.
    """
    if not any(each.has_none for each in reports):
        return
    if empty := [each for each in reports[::tp_size] if each.has_none]:
        raise ValueError(
            f"all weights are on the meta device on {_ranks(empty)}, which {_are_rank0(empty)} of "
            "a TP group and scatters the shards to the other ranks: load them there before sharding"
        )
    others = [each for index, each in enumerate(reports) if index % tp_size]
    if full := [each for each in others if not each.has_none]:
        none = [each for each in others if each.has_none]
        raise ValueError(
            f"all weights are on the meta device on {_ranks(none)}, but not on {_ranks(full)}: "
            "load them on every rank, or leave them on the meta device on every rank but TP rank 0 "
            "of each group"
        )
    if held := [each for each in reports if each.partitioned]:
        raise ValueError(
            f"deepspeed.zero.Init has partitioned the weights on {_ranks(held)}, and they are on "
            "the meta device on other ranks: build the model under one of the two on all ranks, or "
            "load it outside of zero.Init"
        )


def _ranks(said: Sequence[RankReport]) -> str:
    named = ", ".join(str(each.rank) for each in said[:_NAMED])
    return f"rank{'s' if len(said) > 1 else ''} {named}" + (", ..." if len(said) > _NAMED else "")


def _are_rank0(said: Sequence[RankReport]) -> str:
    return "are each TP rank 0" if len(said) > 1 else "is TP rank 0"


def refuse_partly_there(model: nn.Module) -> None:
    """ValueError where a tensor of ``model`` has no values, unless all its parameters have none.

    Buffers may then have values or none.
    """
    parameters = dict(model.named_parameters())
    there = [name for name, parameter in parameters.items() if not parameter.is_meta]
    missing = [name for name, parameter in parameters.items() if parameter.is_meta]
    if missing and there:
        raise ValueError(
            f"{missing[0]} is on the meta device, but {there[0]} is not; load all weights before "
            "sharding, or leave all of them there on every rank but TP rank 0 of each group"
        )
    if missing:
        _refuse_attributes(model)
        return
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ValueError(f"{name} is on the meta device; load it before sharding")


def _refuse_attributes(model: nn.Module) -> None:
    """ValueError for a tensor without values that would not be scattered."""
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta and id(value) not in known:
                raise ValueError(
                    f"{name}.{key} is a tensor on the meta device, but no buffer, so that TP rank "
                    "0 would not broadcast it; pass it to register_buffer, or load the model on "
                    "every rank"
                )
