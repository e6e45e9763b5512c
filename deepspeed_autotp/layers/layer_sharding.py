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
from deepspeed_autotp.distributed.dropout_rng import DropoutRNG
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
    opens_region   a column layer behind which each rank has its own features
    closes_region  a row layer that is given these
    """

    group: TPGroup
    input: SharedInput
    layout: ShardLayout
    rng: DropoutRNG
    siblings: tuple[Mapping[str, Tensor | None], ...] = ()
    gather_output: bool = False
    split_input: bool = False
    opens_region: bool = False
    closes_region: bool = False
    gather: Callable[[Tensor, LayerSharding], Tensor] = all_gather_output
    reduce: Callable[[Tensor, TPGroup], Tensor] = reduce_from_tp_region

    def enter_region(self, x: Tensor, *, training: bool) -> None:
        """At the input of a column layer: what follows is sharded."""
        if self.opens_region and training and self.rng.is_active:
            self.rng.check_called_from_block()
            self.rng.enter(x.device)

    def leave_region(self, *, training: bool) -> None:
        """At the input of a row layer: what follows is replicated.

        Before the product, since a recomputation may end in it.
        """
        if self.closes_region and training and self.rng.is_active:
            self.rng.check_called_from_block()
            self.rng.leave()
        self.input.forget()
