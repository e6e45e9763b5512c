# SPDX-License-Identifier: Apache-2.0
"""A full activation of which this rank has its own tokens, gathered when its values are used.

Between the layers of a stack and the loss, a final norm and the output head take tokens one by one,
and are given the shard. Whatever else uses the values gathers them: every rank does that or none.

forward   an all-gather at the first use, if there is one
backward  none: the gradient of a use is full, and this rank takes its rows
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeed_autotp.distributed.gathered_later import GatheredLater
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.distributed.sequence_collectives import (
    GatheredSequence,
    SequenceLayout,
    gather_from_sequence_region,
    own_rows_of_gradient,
)
from deepspeed_autotp.interop.first_derivatives import once_differentiable
from deepspeed_autotp.interop.torch_private import (
    has_gradient_hooks,
    plain_results,
    tensor_without_memory,
    version_counter,
    with_leaves,
)

_PLAIN = plain_results()
_GRADIENT = (
    "{}: the output head or a norm already took hidden states before this; with "
    "tensor_parallel.sequence_parallel a rank took its own tokens of them, so no gradient of all "
    "tokens is formed. Ask for it before the head and the norm are called, pass "
    "output_hidden_states=True, or set tensor_parallel.sequence_parallel to false"
)
_OF_GRADIENT: frozenset[Any] = frozenset(
    {Tensor.retain_grad, Tensor.register_hook, torch.autograd.grad, torch.autograd.backward}
)


class LazySequence(GatheredLater):
    """``[..., F]``, of which this rank has ``shard``, ``[1, n, F]``.

    Reading shape, dtype or device gathers nothing, nor does an index that takes everything.
    """

    shard: Tensor
    layout_of_shard: SequenceLayout
    group: TPGroup
    _node: Any  # of autograd, that made it
    _is_taken: bool  # its shard was used instead of it

    def _gather(self) -> Tensor:
        return gather_from_sequence_region(self.shard, self.layout_of_shard, self.group)

    def gathered(self) -> GatheredSequence:
        """The values for layers that sum the gradient over the ranks. Every rank calls it."""
        return GatheredSequence.of(self.shard, self._gather(), self.layout_of_shard)

    def tensor(self) -> Tensor:
        """The values as a plain tensor, with their gradient. Every rank calls it."""
        plain = self.view_as(self)
        if self._is_taken and self.shard.requires_grad:
            # The gradient of the view would be a part of it.
            self.shard.register_hook(_RefuseGradients(plain))
        return plain

    def take_own_tokens(self) -> LazySequence | None:
        """This, where its shard may be used instead: autograd knows it as the shard gathered, its
        values, which any alias may write to, were not read, and nothing waits for its gradient."""
        is_same = self.grad_fn is self._node and self.requires_grad == self.shard.requires_grad
        if not is_same or version_counter(self) > 0 or self._full is not None:
            return None
        if self.retains_grad or has_gradient_hooks(self):
            return None
        self._is_taken = True
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[0], cls) and _takes_all(*args):
            return args[0]
        if func in _OF_GRADIENT:
            _refuse_taken(func, args, kwargs or {})
        return _PLAIN(func, types, args, dict(kwargs or {}))


def _takes_all(x: Tensor, index: Any) -> bool:
    """Whether an index gives all of ``x``; torch refuses one of more dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    every = (slice(None), slice(0, None))
    slices = sum(isinstance(each, slice) and each in every for each in parts)
    rest = sum(each is Ellipsis for each in parts)
    return slices <= x.dim() and slices + rest == len(parts)


class _RefuseGradients:
    """RuntimeError in a backward pass in which the gradient of ``plain`` was asked for."""

    def __init__(self, plain: Tensor) -> None:
        self._plain = weakref.ref(plain)

    def __call__(self, gradient: Tensor) -> None:
        plain = self._plain()
        if plain is not None and (plain.retains_grad or has_gradient_hooks(plain)):
            raise RuntimeError(_GRADIENT.format("the gradient of hidden states in the outputs"))


def _refuse_taken(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """RuntimeError where the gradient is asked for of what ranks took their own tokens of."""
    found: list[LazySequence] = []
    with_leaves(LazySequence, found.append, (tuple(args), dict(kwargs)))
    if any(x._is_taken for x in found):
        raise RuntimeError(_GRADIENT.format(func.__name__))


class _GatherLater(torch.autograd.Function):
    """shard -> LazySequence; the gradient is this rank's rows of the full gradient."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, layout: SequenceLayout, group: TPGroup) -> Tensor:
        ctx.layout, ctx.rank, ctx.shape = layout, group.rank, shard.shape
        shape = layout.full_shape(shard)
        return tensor_without_memory(LazySequence, shape, dtype=shard.dtype, device=shard.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return own_rows_of_gradient(dy, ctx.layout, ctx.rank).reshape(ctx.shape), None, None


def gather_later(shard: Tensor, layout: SequenceLayout, group: TPGroup) -> LazySequence:
    """As ``gather_from_sequence_region``, where values are used."""
    made: LazySequence = _GatherLater.apply(shard, layout, group)  # type: ignore[no-untyped-call]
    made.shard, made.layout_of_shard, made.group = shard, layout, group
    made._node, made._is_taken = made.grad_fn, False
    return made


def own_tokens(x: Any) -> LazySequence | None:
    """``x``, a LazySequence whose shard may be used instead, or None."""
    return x.take_own_tokens() if isinstance(x, LazySequence) else None
