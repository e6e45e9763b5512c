# SPDX-License-Identifier: Apache-2.0
"""What every sharded layer knows: its TP group, its model's run, and how it is sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from deepspeed_autotp.distributed.autograd_collectives import (
    ShardLayout,
    gather_from_tp_region,
    reduce_from_tp_region,
    scatter_to_tp_region,
)
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.module_state import state_of
from deepspeed_autotp.layers.forward_context import ForwardContext


def all_gather_output(y: Tensor, sharding: LayerSharding) -> Tensor:
    """``[T, O/R] -> [T, O]``: the full output of a column layer."""
    return gather_from_tp_region(y, sharding.layout, sharding.group)


@dataclass(frozen=True, slots=True)
class LayerSharding:
    """How a layer is sharded; :func:`sharding_of` gives that of a module.

    group          of its TP ranks
    context        of its model's forward
    layout         the runs of each rank along the sharded dimension
    siblings       parameters of the layers, this one among them, that are likely to share its
                   input; not the modules, which would make a reference cycle
    gather_output  a column layer gives its full output, by ``gather``
    split_input    a row layer is given the full input, and takes its shard
    reduce         the output of a row layer from this rank's summand
    opens_region   a column layer behind which each rank has its own features
    closes_region  a row layer that is given these
    local_shapes   of this rank's shards of the layer's own parameters, by name
    """

    group: TPGroup
    context: ForwardContext
    layout: ShardLayout
    siblings: tuple[Mapping[str, Tensor | None], ...] = ()
    gather_output: bool = False
    split_input: bool = False
    opens_region: bool = False
    closes_region: bool = False
    local_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    gather: Callable[[Tensor, LayerSharding], Tensor] = all_gather_output
    reduce: Callable[[Tensor, TPGroup], Tensor] = reduce_from_tp_region

    def enter_region(self, x: Tensor) -> None:
        """At the input of a column layer: what follows is sharded."""
        if self.opens_region and self.context.rng.is_active:
            self.context.rng.check_called_from_block()
            self.context.rng.enter(x.device)

    def leave_region(self) -> None:
        """At the input of a row layer: what follows is replicated.

        Before the product, since a recomputation may end in it.
        """
        if self.closes_region and self.context.rng.is_active:
            self.context.rng.check_called_from_block()
            self.context.rng.leave()
        self.context.input.forget()

    def row_output(
        self, x: Tensor, product: Callable[[Tensor], Tensor], bias: Tensor | None
    ) -> Tensor:
        """The output of a row layer: ``product`` of this rank's features, summed, and ``bias``."""
        self.leave_region()
        if self.split_input:
            x = scatter_to_tp_region(x, self.layout, self.group)
        y = self.reduce(product(x), self.group)
        # Under autocast the bias is wider than the product, and would widen the output.
        return y if bias is None else y + bias.to(y.dtype)


def sharding_of(module: nn.Module) -> LayerSharding:
    """How a sharded layer is sharded; KeyError for another module."""
    return state_of(module, LayerSharding)
