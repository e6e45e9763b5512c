# SPDX-License-Identifier: Apache-2.0
"""Which ranks hold the weights of a model before it is sharded: all, or the first of each group.

The others then have built it under ``torch.device("meta")``: names, shapes and data types, but no
values. Every rank answers alike, and refuses alike what is neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from deepspeed_autotp import interop
from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.planning.model_description import Description

# How many ranks an error lists.
_NAMED = 8


@dataclass(frozen=True, slots=True)
class Holding:
    """``place`` is where the weights lie, or where a rank without any is to have its own.

    ``by_first`` says that only the first rank of each group holds them.
    """

    place: torch.device
    by_first: bool


@dataclass(frozen=True, slots=True)
class _Said:
    """What a rank tells the others of itself."""

    rank: int
    group: tuple[int, ...]
    device: str
    partitioned: bool

    @property
    def is_first(self) -> bool:
        return self.rank == self.group[0]

    @property
    def has_none(self) -> bool:
        return self.device == "meta"


def agreed_holding(description: Description, group: TPGroup, agreement: Agreement) -> Holding:
    """Who holds the weights, on every rank; ValueError on all of them as in the module's words."""
    own = description.parameters[0].device
    said = agreement.exchange(
        _Said(
            rank=dist.get_rank(),
            group=group.global_ranks,
            device=own.type,
            partitioned=any(interop.is_partitioned(p) for p in description.parameters),
        )
    )
    if not any(each.has_none for each in said):
        return Holding(own, by_first=False)
    _refuse(said)
    (kind,) = {each.device for each in said if each.rank == group.global_ranks[0]}
    if group.rank == 0:
        return Holding(own, by_first=True)
    place = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else kind
    return Holding(torch.device(place), by_first=True)


def _refuse(said: Sequence[_Said]) -> None:
    """ValueError where some weights are on the meta device and others would have to be."""
    if empty := [each for each in said if each.is_first and each.has_none]:
        raise ValueError(
            f"all weights are on the meta device on {_ranks(empty)}, which {_are_first(empty)} of "
            "the ranks that share a model and hands the others their parts: load them there before "
            "sharding"
        )
    others = [each for each in said if not each.is_first]
    if full := [each for each in others if not each.has_none]:
        none = [each for each in others if each.has_none]
        raise ValueError(
            f"all weights are on the meta device on {_ranks(none)}, but not on {_ranks(full)}: "
            "load them on every rank, or leave them on the meta device on every rank but the first "
            "of each model"
        )
    if held := [each for each in said if each.partitioned]:
        raise ValueError(
            f"deepspeed.zero.Init holds the weights on {_ranks(held)}, and they are on the meta "
            "device on other ranks: build the model under one of the two on all ranks, or load it "
            "outside of zero.Init"
        )


def _ranks(said: Sequence[_Said]) -> str:
    named = ", ".join(str(each.rank) for each in said[:_NAMED])
    return f"rank{'s' if len(said) > 1 else ''} {named}" + (", ..." if len(said) > _NAMED else "")


def _are_first(said: Sequence[_Said]) -> str:
    return "are each the first" if len(said) > 1 else "is the first"


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
            "sharding, or leave all of them there on every rank but the first of each model"
        )
    if missing:
        _refuse_attributes(model)
        return
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ValueError(f"{name} is on the meta device; load it before sharding")


def _refuse_attributes(model: nn.Module) -> None:
    """ValueError for a tensor without values that nobody would hand out."""
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta and id(value) not in known:
                raise ValueError(
                    f"{name}.{key} is a tensor on the meta device and no buffer, so that the first "
                    "rank would not hand it out; give it to register_buffer, or load the model on "
                    "every rank"
                )
