# SPDX-License-Identifier: Apache-2.0
"""How logits are sharded over the ranks, and the state of a shard's memory."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepspeed_autotp.distributed.autograd_collectives import ShardLayout, scatter_to_tp_region
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.vocab_parallel.soft_cap import Derivative, Steps


@dataclass(frozen=True, slots=True)
class VocabularySharding:
    """How the last dimension is sharded: one run a rank."""

    layout: ShardLayout
    group: TPGroup

    def shard_of(self, full: Tensor) -> Tensor:
        """This rank's shard, without a gradient function."""
        with torch.no_grad():
            return scatter_to_tp_region(full, self.layout, self.group)


@dataclass(slots=True)
class Memory:
    """The state of the memory of one rank's shard, which views of it share.

    losses    how many cross-entropies read it; a single one may write its gradient there
    kept      some operation reads it in its backward
    spent     the gradient was written there
    replaced  the full logits were gathered and changed in place; the shard is out of date
    passed    gradients of a loss or of a view go to other logits and not through these
    deferred  steps that will read it
    """

    losses: int = 0
    kept: bool = False
    spent: bool = False
    replaced: bool = False
    passed: bool = False
    deferred: weakref.WeakSet[Deferred] = field(default_factory=weakref.WeakSet)

    def may_overwrite(self, capped: Memory | None = None) -> bool:
        """Whether the only loss may write its gradient here; it does so after True.

        ``capped`` is the memory of the deferred values that the loss uses instead of these.
        """
        awaited = any(x.raw is not None and x.memory is not capped for x in self.deferred)
        self.spent = self.losses == 1 and not self.kept and not awaited
        return self.spent

    def check(self) -> None:
        """RuntimeError unless the memory holds the logits."""
        self.check_unspent()
        if self.replaced:
            raise RuntimeError(
                "these logits were modified in place through another view; use the view that was "
                "modified, or modify a clone()"
            )

    def check_unspent(self) -> None:
        """RuntimeError after a gradient was written over the logits."""
        if self.spent:
            raise RuntimeError(
                "these logits are used for the first time after the backward pass, which has "
                "overwritten them with their gradient; before loss.backward(), take a clone() of "
                "outputs.logits or what you need of them, such as argmax(-1), since detach(), "
                "float() and views copy nothing; or set tensor_parallel.vocab_parallel_lm_head to "
                "false"
            )


class Deferred:
    """Steps over a rank's shard that are deferred until their values are read.

    ``raw`` are the logits before the first step, None once the values are computed. ``memory`` is
    that of the values, which views of them share before it is allocated.
    """

    def __init__(self, raw: Tensor, shard: Tensor, source: Memory, memory: Memory, steps: Steps):
        self.raw: Tensor | None = raw
        self.memory, self.steps = memory, steps
        self.derivative = Derivative(steps)
        self._shard, self._source, self._dtype = shard, source, raw.dtype
        source.deferred.add(self)

    @property
    def shape(self) -> torch.Size:
        return self._shard.shape

    @property
    def device(self) -> torch.device:
        return self._shard.device

    def read(self) -> Tensor:
        """The values, computed at the first call; the shard before the steps is released then."""
        if self.raw is not None:
            # Full logits that were changed in place since then have not changed the shard.
            self._source.check_unspent()
            # Values that are read without gradients may be needed with gradients later.
            with torch.inference_mode(False), torch.no_grad():
                self._shard = self.derivative.values(self._shard.to(self._dtype))
            self.raw = None
            # The backward of tanh reads its result.
            self.memory.kept |= self._shard is self.derivative.tanh
        return self._shard
