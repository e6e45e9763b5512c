# SPDX-License-Identifier: Apache-2.0
"""How logits are cut over the ranks, and what becomes of a part's memory."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepspeed_autotp.distributed.mappings import Parts, take_own
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.vocab_parallel.soft_cap import Derivative, Steps


@dataclass(frozen=True, slots=True)
class Cut:
    """How the last dimension is cut: one run a rank."""

    parts: Parts
    group: TPGroup

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part; the gradient is left to the caller."""
        with torch.no_grad():
            return take_own(whole, self.parts, self.group)


@dataclass(slots=True)
class Memory:
    """What is known of the memory of one rank's part, which views of it share.

    losses    how many cross-entropies read it; a single one may leave its gradient there
    kept      some operation reads it in its backward
    spent     the gradient has taken its place
    replaced  the whole logits were gathered and changed in place; the part is out of date
    passed    gradients of a loss or of a view go to other logits and not through these
    late      what is put off: values that are to be computed from it
    """

    losses: int = 0
    kept: bool = False
    spent: bool = False
    replaced: bool = False
    passed: bool = False
    late: weakref.WeakSet[Late] = field(default_factory=weakref.WeakSet)

    def may_overwrite(self, capped: Memory | None = None) -> bool:
        """Whether the only loss may write its gradient here; it does so when told yes.

        ``capped`` is the memory of the put-off values that the loss has in place of these.
        """
        awaited = any(x.raw is not None and x.memory is not capped for x in self.late)
        self.spent = self.losses == 1 and not self.kept and not awaited
        return self.spent

    def check(self) -> None:
        """RuntimeError unless the memory holds the logits."""
        self.check_unspent()
        if self.replaced:
            raise RuntimeError(
                "these logits were changed in place through another view of them; use the view "
                "that was changed, or change a clone"
            )

    def check_unspent(self) -> None:
        """RuntimeError when a gradient is where the logits were."""
        if self.spent:
            raise RuntimeError(
                "these logits are used for the first time after the backward pass, which has "
                "written their gradient in their place; before loss.backward(), take a clone() of "
                "outputs.logits or what you need of them, such as argmax(-1), since detach(), "
                "float() and views copy nothing; or set tensor_parallel.vocab_parallel_lm_head to "
                "false"
            )


class Late:
    """Steps over a rank's part that are put off until somebody reads their numbers.

    ``raw`` are the logits before the first step, None once the numbers are there. ``memory`` is
    that of the numbers, which views of them share before it is there.
    """

    def __init__(self, raw: Tensor, part: Tensor, source: Memory, memory: Memory, steps: Steps):
        self.raw: Tensor | None = raw
        self.memory, self.steps = memory, steps
        self.derivative = Derivative(steps)
        self._part, self._source, self._dtype = part, source, raw.dtype
        source.late.add(self)

    @property
    def shape(self) -> torch.Size:
        return self._part.shape

    @property
    def device(self) -> torch.device:
        return self._part.device

    def read(self) -> Tensor:
        """The numbers, computed at the first call; the part before the steps is let go then."""
        if self.raw is not None:
            # Whole logits that were changed in place since then have left the part as it was.
            self._source.check_unspent()
            # Numbers that are read without gradients may be needed for some later.
            with torch.inference_mode(False), torch.no_grad():
                self._part = self.derivative.values(self._part.to(self._dtype))
            self.raw = None
            # The backward of tanh reads its result.
            self.memory.kept |= self._part is self.derivative.tanh
        return self._part
