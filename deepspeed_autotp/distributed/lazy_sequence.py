# SPDX-License-Identifier: Apache-2.0
"""A full activation of which this rank has its own tokens, gathered when its values are used.

Between the layers of a stack and the loss, a final norm and the output head take tokens one by one,
and are given the shard. Whatever else uses the values gathers them: every rank does that or none.

forward   an all-gather at the first use, if there is one
backward  none: the gradient of a use is full, and this rank takes its rows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.distributed.sequence_collectives import (
    GatheredSequence,
    SequenceLayout,
    gather_from_sequence_region,
    own_rows_of_gradient,
)
from deepspeed_autotp.interop.torch_private import (
    has_gradient_hooks,
    plain_results,
    tensor_without_memory,
    version_counter,
    with_leaves,
)

_PLAIN = plain_results()


class LazySequence(Tensor):
    """``[..., F]``, of which this rank has ``shard``, ``[1, n, F]``.

    Reading shape, dtype or device gathers nothing, nor does an index that takes everything.
    """

    shard: Tensor
    layout_of_shard: SequenceLayout
    group: TPGroup
    _full: Tensor | None

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        # Without values: printing on one rank must not wait for the others.
        return f"LazySequence({list(self.shape)}, {self.dtype}; gathered when used)"

    def full(self) -> Tensor:
        """The values, gathered at the first call. Every rank calls it."""
        if self._full is None:
            with torch.no_grad():
                self._full = gather_from_sequence_region(
                    self.shard, self.layout_of_shard, self.group
                )
        return self._full

    def gathered(self) -> GatheredSequence:
        """The values for layers that sum the gradient over the ranks. Every rank calls it."""
        full = gather_from_sequence_region(self.shard, self.layout_of_shard, self.group)
        return GatheredSequence.of(self.shard, full, self.layout_of_shard)

    def tensor(self) -> Tensor:
        """The values as a plain tensor, with their gradient. Every rank calls it."""
        return self.view_as(self)

    def data_ptr(self) -> int:
        """Of the values, for kernels that are no operations of torch."""
        return self.full().data_ptr()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[0], cls) and _takes_all(args[1]):
            return args[0]
        return _PLAIN(func, types, args, dict(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # What writes is given the values, too, which later uses are given.
        args, named = with_leaves(cls, cls.full, (tuple(args), dict(kwargs or {})))
        return func(*args, **named)


def _takes_all(index: Any) -> bool:
    """Whether an index gives all of a tensor that has as many dimensions, or more."""
    every = slice(None)
    return all(
        each is Ellipsis or (isinstance(each, slice) and each in (every, slice(0, None)))
        for each in (index if isinstance(index, tuple) else (index,))
    )


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
    made.shard, made.layout_of_shard, made.group, made._full = shard, layout, group, None
    return made


def own_tokens(x: Any) -> LazySequence | None:
    """``x`` where its shard may be used instead: nothing has written to it or to a view of it, and
    nothing waits for its gradient."""
    if not isinstance(x, LazySequence) or version_counter(x) > 0:
        return None
    return None if x.retains_grad or has_gradient_hooks(x) else x
