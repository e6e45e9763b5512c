# SPDX-License-Identifier: Apache-2.0
"""What every sharded layer knows: its TP group, and the layout of its sharded dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from deepspeed_autotp.distributed.autograd_collectives import (
    ShardLayout,
    gather_from_tp_region,
    reduce_from_tp_region,
)
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.layers.grad_overlap import SharedInput


def all_gather_output(y: Tensor, sharding: LayerSharding) -> Tensor:
    """``[T, O/R] -> [T, O]``: the full output of a column layer."""
    return gather_from_tp_region(y, sharding.layout, sharding.group)


@dataclass(frozen=True, slots=True)
class LayerSharding:
    """The ``sharding`` of a layer.

    siblings       parameters of the layers, this one among them, that are likely to share its
                   input; not the modules, which would make a reference cycle
    gather_output  a column layer gives its full output, by ``gather``
    split_input    a row layer is given the full input, and takes its shard
    reduce         the output of a row layer from this rank's summand
    """

    group: TPGroup
    input: SharedInput
    layout: ShardLayout
    siblings: tuple[Mapping[str, Tensor | None], ...] = ()
    gather_output: bool = False
    split_input: bool = False
    gather: Callable[[Tensor, LayerSharding], Tensor] = all_gather_output
    reduce: Callable[[Tensor, TPGroup], Tensor] = reduce_from_tp_region

    def enter_region(self, x: Tensor, *, training: bool) -> None:
        """At the input of a column layer: what follows is sharded."""
        if training and not self.gather_output and self.layout.is_uneven:
            self.group.rng.enter_region(x.device)

    def leave_region(self, x: Tensor) -> None:
        """At the input of a row layer: what follows is replicated.

        Before the product, since a recomputation may end in it.
        """
        self.group.rng.leave_region(x.device)
        self.input.forget()
