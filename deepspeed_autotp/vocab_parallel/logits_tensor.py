# SPDX-License-Identifier: Apache-2.0
"""Sharded logits as tensors: what they hold, and their autograd functions.

What torch's functions do with them is decided in logits.py, by the class defined there.

V is the size of the vocabulary, R the number of ranks.
"""

from __future__ import annotations

import weakref
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepspeed_autotp.distributed.autograd_collectives import gather_from_tp_region
from deepspeed_autotp.vocab_parallel.logits_shard import Deferred, Memory, VocabularySharding
from deepspeed_autotp.vocab_parallel.soft_cap import Steps, cap_of

__all__ = ["ShardedLogits", "as_logits", "cast_shard", "like", "defer", "local_shard", "widened"]


class ShardedLogits(Tensor):
    """A tensor [..., V] of which this rank holds ``shard``, [..., V/R].

    Shape, dtype and gradient function are those of the full tensor, which has no memory. ``shard``
    may be of a smaller dtype: the cast is done where its values are read. The gradient is such a
    tensor as well, or a plain full one.

    The steps of a soft cap are deferred until their values are read; ``_held`` is a Deferred until
    then. A loss does not read them: it applies the cap itself and takes the logits before the
    steps, where these are ``direct``, that is, without another operation in between.
    """

    _held: Tensor | Deferred
    direct: bool
    sharding: VocabularySharding
    memory: Memory
    _full: Tensor | None
    _gathered: int

    @staticmethod
    def __new__(
        cls,
        shard: Tensor | Deferred,
        sharding: VocabularySharding,
        memory: Memory,
        dtype: torch.dtype,
        direct: bool = False,
    ) -> Self:
        made: Self = Tensor._make_wrapper_subclass(
            cls, (*shard.shape[:-1], sharding.layout.size), dtype=dtype, device=shard.device
        )
        made._held, made.direct, made.sharding, made.memory = shard, direct, sharding, memory
        made._full, made._gathered = None, 0
        return made

    @property
    def shard(self) -> Tensor:
        """This rank's values; deferred steps are computed now."""
        return self.settle()

    def settle(self) -> Tensor:
        """Compute deferred steps; gradients go through these logits from then on."""
        if isinstance(self._held, Deferred):
            self._held = self._held.read()
        return self._held

    def before_steps(self) -> tuple[Self, Steps]:
        """The logits before deferred steps, and the steps; itself where there are none."""
        deferred = self._held
        if isinstance(deferred, Deferred) and self.direct:
            raw = deferred.raw
            if isinstance(raw, type(self)) and not raw.changed() and not raw.memory.replaced:
                return raw, deferred.steps
        return self, ()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        # Without values: printing on one rank must not wait for the others.
        return f"Logits({list(self.shape)}, {self.dtype}; gathered when used)"

    def __format__(self, spec: str) -> str:
        return object.__format__(self, spec)

    def full(self) -> Tensor:
        """The full logits, gathered at the first call. Every rank calls it.

        RuntimeError when the gradient was written over the logits.
        """
        if self._full is None:
            self.memory.check()
            # A use without gradients may come before one with gradients.
            with torch.inference_mode(False), torch.enable_grad():
                self._full = _Gather.apply(self)  # type: ignore[no-untyped-call]
            self._gathered = self._full._version
        return self._full

    def changed(self) -> bool:
        """Whether the result of ``full`` was written to."""
        return self._full is not None and self._full._version != self._gathered

    def again(self) -> Self:
        """The same logits without a gradient function."""
        made = type(self)(self._held, self.sharding, self.memory, self.dtype)
        if self._full is not None:
            # Below autograd a detached tensor has a version counter of its own.
            made._full = self._full.detach()
            made._gathered = -1 if self.changed() else made._full._version
        return made

    def rely_on_full(self) -> None:
        """Take the full logits to be changed from now on."""
        self._gathered = -1


class _FromShard(torch.autograd.Function):
    """A rank's shard as logits."""

    @staticmethod
    def forward(
        ctx: Any,
        shard: Tensor,
        kind: type[ShardedLogits],
        sharding: VocabularySharding,
        memory: Memory,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.sharding, ctx.dtype = sharding, shard.dtype
        return kind(shard.detach(), sharding, memory, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        shard = dy.shard if isinstance(dy, ShardedLogits) else ctx.sharding.shard_of(dy)
        return shard.to(ctx.dtype), None, None, None, None


class _Defer(torch.autograd.Function):
    """Steps that are computed where their values are read, or in the backward."""

    @staticmethod
    def forward(ctx: Any, raw: ShardedLogits, memory: Memory, steps: Steps) -> Tensor:
        deferred = Deferred(raw, raw.shard, raw.memory, memory, steps)
        ctx.kind, ctx.sharding, ctx.dtype = type(raw), raw.sharding, raw.dtype
        ctx.derivative, ctx.deferred = deferred.derivative, weakref.ref(deferred)
        return type(raw)(deferred, raw.sharding, memory, raw.dtype, direct=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        deferred = ctx.deferred()
        if deferred is not None:
            deferred.read()
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        shard = dy.shard if isinstance(dy, ShardedLogits) else ctx.sharding.shard_of(dy)
        dshard = ctx.derivative.gradient(shard.to(ctx.dtype), again=again)
        return ctx.kind(dshard, ctx.sharding, Memory(), ctx.dtype), None, None


class _LocalShard(torch.autograd.Function):
    """The rank's shard of logits, in their dtype or its own."""

    @staticmethod
    def forward(ctx: Any, x: ShardedLogits, cast: bool) -> Tensor:
        ctx.kind, ctx.sharding, ctx.dtype = type(x), x.sharding, x.dtype
        return (cast_shard(x) if cast else x.shard).detach()

    @staticmethod
    def backward(ctx: Any, dshard: Tensor) -> tuple[Tensor, None]:
        return ctx.kind(dshard, ctx.sharding, Memory(), ctx.dtype), None


class _Widen(torch.autograd.Function):
    """Logits of another dtype; the shard is cast where its values are read."""

    @staticmethod
    def forward(ctx: Any, x: ShardedLogits, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        if cap_of(x.before_steps()[1]):
            return type(x)(x._held, x.sharding, x.memory, dtype, direct=True)
        return type(x)(x.shard, x.sharding, x.memory, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        if isinstance(dy, ShardedLogits):
            return type(dy)(dy.shard, dy.sharding, dy.memory, ctx.dtype), None
        return dy.to(ctx.dtype), None


class _Gather(torch.autograd.Function):
    """Logits as a plain tensor."""

    @staticmethod
    def forward(ctx: Any, x: ShardedLogits) -> Tensor:
        return gather_from_tp_region(x.shard, x.sharding.layout, x.sharding.group).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def as_logits(
    kind: type[ShardedLogits],
    shard: Tensor,
    sharding: VocabularySharding,
    memory: Memory,
    dtype: torch.dtype,
) -> ShardedLogits:
    """Logits of class ``kind`` whose shard is ``shard``."""
    logits: ShardedLogits = _FromShard.apply(shard, kind, sharding, memory, dtype)  # type: ignore[no-untyped-call]
    return logits


def local_shard(x: ShardedLogits, *, cast: bool) -> Tensor:
    """The shard of ``x`` in the autograd graph; in the dtype of ``x`` where ``cast``."""
    x.memory.check()
    shard: Tensor = _LocalShard.apply(x, cast)  # type: ignore[no-untyped-call]
    return shard


def cast_shard(x: ShardedLogits) -> Tensor:
    """The shard in the dtype of ``x``."""
    return x.shard.to(x.dtype)


def like(x: ShardedLogits, shard: Tensor, dtype: torch.dtype) -> ShardedLogits:
    """Logits of another shard, which may be a view of the shard of ``x``."""
    shared = shard.untyped_storage().data_ptr() == x.shard.untyped_storage().data_ptr()
    return as_logits(type(x), shard, x.sharding, x.memory if shared else Memory(), dtype)


def defer(raw: ShardedLogits, memory: Memory, steps: Steps) -> ShardedLogits:
    """The logits after ``steps``; ``memory`` is that of their values."""
    logits: ShardedLogits = _Defer.apply(raw, memory, steps)  # type: ignore[no-untyped-call]
    return logits


def widened(x: ShardedLogits, dtype: torch.dtype) -> ShardedLogits:
    """The same values in a larger dtype, without a copy."""
    logits: ShardedLogits = _Widen.apply(x, dtype)  # type: ignore[no-untyped-call]
    return logits
