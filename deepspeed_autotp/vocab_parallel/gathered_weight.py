# SPDX-License-Identifier: Apache-2.0
"""Weights that are used outside of their layer's forward.

A loss that never materializes the logits multiplies by ``lm_head.weight`` itself. In the forward of
the model, but outside of the layer's own, ``weight`` and ``bias`` of a layer with ``gather_output``
read as full tensors, which are gathered where their values are used. What is trained is this rank's
shard. Elsewhere, as for an optimizer or a user, the shard is what is read. TRL's fused head takes
the shard itself: no rank gathers the weight, or forms all logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp.distributed.autograd_collectives import (
    ShardLayout,
    gather_from_tp_region,
    gradient_shard,
)
from deepspeed_autotp.distributed.gathered_later import GatheredLater
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.deepspeed.parameters import copy_zero_status, is_partitioned
from deepspeed_autotp.interop.first_derivatives import once_differentiable
from deepspeed_autotp.interop.module_state import find_state, set_state, state_of
from deepspeed_autotp.interop.torch_private import (
    backward_id,
    own_parameters,
    tensor_without_memory,
    version_counter,
    written_arguments,
)
from deepspeed_autotp.interop.trl import replace_head_kernel
from deepspeed_autotp.layers.class_swap import mix_in
from deepspeed_autotp.layers.forward_context import ForwardContext
from deepspeed_autotp.layers.layer_sharding import LayerSharding, sharding_of
from deepspeed_autotp.vocab_parallel.chunked_head import HeadTask, token_statistics

_WRITTEN = (
    "the weight of a sharded layer was written to in the forward of the model, where it reads as a "
    "full copy of the shards; write to it outside of the forward, within "
    "deepspeed_autotp.gather_params(weight, modifier_rank=0)"
)


class GatheredWeight(GatheredLater):
    """A full weight or bias of which this rank has ``shard``; gathered at the first use.

    Reading shape, dtype or device gathers nothing, as models ask for them to cast what they
    multiply. Any use of the values gathers them first, which every rank does.
    """

    shard: Tensor
    layout_of_shard: ShardLayout
    group: TPGroup
    sharded_dim: int

    def _gather(self) -> Tensor:
        return gather_from_tp_region(
            self.shard, self.layout_of_shard, self.group, dim=self.sharded_dim
        )

    @property
    def data(self) -> Tensor:
        """As ``detach()``."""
        with torch.no_grad():
            own = self.shard, self.layout_of_shard, self.group, self.sharded_dim
            return _made(*own, full=self._full)

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(_WRITTEN)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if any(isinstance(written, cls) for written in written_arguments(func, args, kwargs or {})):
            raise RuntimeError(_WRITTEN)
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Gather(torch.autograd.Function):
    """shard -> GatheredWeight; the gradient is this rank's shard of the full gradient."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, layout: ShardLayout, group: TPGroup, dim: int) -> Tensor:
        ctx.layout, ctx.group, ctx.dim = layout, group, dim
        shape = list(shard.shape)
        shape[dim] = layout.size
        made: Tensor = tensor_without_memory(
            GatheredWeight, shape, dtype=shard.dtype, device=shard.device
        )
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient_shard(dw, ctx.layout, ctx.group.rank, ctx.dim), None, None, None


def gathered_weight(shard: Tensor, sharding: LayerSharding, *, dim: int) -> GatheredWeight:
    """The full tensor of ``shard``, which is sharded along ``dim``."""
    return _made(shard, sharding.layout, sharding.group, dim, full=None)


def _made(
    shard: Tensor, layout: ShardLayout, group: TPGroup, dim: int, *, full: Tensor | None
) -> GatheredWeight:
    made: GatheredWeight = _Gather.apply(shard, layout, group, dim)  # type: ignore[no-untyped-call]
    made.shard, made.layout_of_shard, made.group, made.sharded_dim = shard, layout, group, dim
    made._full = full
    copy_zero_status(made, shard)
    return made


def statistics_of_shard(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float,
    soft_cap: float,
    scale: float,
) -> tuple[Tensor, ...] | None:
    """As ``token_statistics``; None where the shard of the weight is not at hand: for other
    weights, and under ZeRO 3, which has it in the forward alone."""
    if not isinstance(weight, GatheredWeight) or is_partitioned(weight.shard):
        return None
    if weight.sharded_dim != 0 or not (bias is None or isinstance(bias, GatheredWeight)):
        return None
    task = HeadTask(weight.layout_of_shard, weight.group, temperature, soft_cap, scale)
    shift = None if bias is None else bias.shard
    found = token_statistics(hidden, weight.shard, shift, labels, task)
    rest = (found.log_sum_sq_probs, found.mean_logits, found.is_top1)
    return (found.log_probs, found.entropy, *rest)


@dataclass(slots=True)
class _OwnForward:
    """Whether the layer's own forward runs, to which ``weight`` is the shard."""

    is_running: bool = False


@contextmanager
def reading_shard(layer: nn.Module) -> Iterator[None]:
    """A context in which the weight of ``layer`` is its shard, also in the model's forward, and
    may be changed."""
    own = find_state(layer, _OwnForward)
    if own is None:
        yield
        return
    before, own.is_running = own.is_running, True
    try:
        yield
    finally:
        own.is_running = before
        gathered = sharding_of(layer).context.gathered
        for request in [each for each in gathered if each[0] is layer]:
            del gathered[request]


class ReadsFullWeight(nn.Module):
    """A column layer with ``gather_output``, mixed into its class.

    Within one forward of the model a weight is gathered once, however often it is read.
    """

    def forward(self, x: Tensor) -> Tensor:
        own = state_of(self, _OwnForward)
        before, own.is_running = own.is_running, True
        try:
            y: Tensor = super().forward(x)
        finally:
            own.is_running = before
        return y

    @property
    def weight(self) -> Tensor | None:
        """[O, I] in the model's forward outside of the layer's own, else this rank's [O/R, I]."""
        return _read(self, "weight")

    @property
    def bias(self) -> Tensor | None:
        """[O] or [O/R], as ``weight``."""
        return _read(self, "bias")


def read_full_weight(
    layer: nn.Module, context: ForwardContext, undo: list[Callable[[], None]]
) -> None:
    """Let the weight of a sharded ``layer`` read as full in the model's forward; ``undo`` receives
    what undoes each step."""
    context.prepare = _replace_head_kernel
    undo.append(set_state(layer, _OwnForward()))
    undo.append(mix_in(ReadsFullWeight, layer))


def _replace_head_kernel() -> None:
    if not torch.compiler.is_compiling():
        replace_head_kernel(statistics_of_shard)


def _read(layer: nn.Module, key: str) -> Tensor | None:
    """The parameter ``key`` of ``layer``."""
    if key not in own_parameters(layer):
        raise AttributeError(key)  # which nn.Module turns into its own message
    shard, context = own_parameters(layer)[key], sharding_of(layer).context
    if shard is None or state_of(layer, _OwnForward).is_running or not _is_in_forward(context):
        return shard
    try:
        return _full(layer, key, shard, context)
    except AttributeError as error:
        # Python would take it for a missing attribute, and ask nn.Module, which has the shard.
        raise RuntimeError(f"{key} of {layer} cannot be gathered: {error}") from error


def _is_in_forward(context: ForwardContext) -> bool:
    if context.is_in_forward or torch.compiler.is_compiling():
        return context.is_in_forward
    return backward_id() >= 0  # a checkpointed part that runs again


def _full(layer: nn.Module, key: str, shard: Tensor, context: ForwardContext) -> Tensor:
    sharding = sharding_of(layer)
    dim = 0 if isinstance(layer, nn.Linear) else -1
    if torch.compiler.is_compiling():
        return gather_from_tp_region(shard, sharding.layout, sharding.group, dim=dim)
    if not context.is_in_forward:
        return gathered_weight(shard, sharding, dim=dim)
    # Of these values: a forward that was interrupted leaves what it has gathered.
    request = layer, key, torch.is_grad_enabled(), version_counter(shard)
    if request not in context.gathered:
        context.gathered[request] = gathered_weight(shard, sharding, dim=dim)
    return context.gathered[request]
