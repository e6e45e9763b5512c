# SPDX-License-Identifier: Apache-2.0
"""Columns sharded over the ranks of this job, in even widths or others."""

import torch
import torch.distributed as dist

from deepspeed_autotp.distributed.autograd_collectives import ShardLayout
from deepspeed_autotp.distributed.dropout_rng import DropoutRNG
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.layers.forward_context import ForwardContext
from deepspeed_autotp.layers.grad_overlap import SharedInput


def layout_of(widths: list[int]) -> ShardLayout:
    """One run after the other, of these widths."""
    starts = [sum(widths[:rank]) for rank in range(len(widths))]
    runs = tuple((start, width) for start, width in zip(starts, widths, strict=True))
    return ShardLayout(size=sum(widths), widths=tuple(widths), runs=runs)


def even_widths(size: int) -> list[int]:
    """Widths of ``size`` columns over the ranks of this job; earlier ranks have one more."""
    ranks = dist.get_world_size()
    return [size // ranks + (rank < size % ranks) for rank in range(ranks)]


def world_group() -> TPGroup:
    handle = dist.group.WORLD
    assert handle is not None
    return TPGroup(handle)


def forward_context(group: TPGroup) -> ForwardContext:
    """Of a model without overlap and dropout."""
    rng = DropoutRNG(group.rank, declared=False, uneven=False)
    return ForwardContext(SharedInput(group, overlap=False), rng=rng)


def own_columns(full: torch.Tensor, layout: ShardLayout, *, leaf: bool = True) -> torch.Tensor:
    """This rank's columns as a tensor of their own, which wants a gradient."""
    start, width = layout.runs[dist.get_rank()]
    return full.detach().narrow(-1, start, width).clone().requires_grad_(leaf)
