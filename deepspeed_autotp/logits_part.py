# SPDX-License-Identifier: Apache-2.0
"""How logits are cut over the ranks, and what becomes of a part's memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepspeed_autotp.collectives import Parts, take_own
from deepspeed_autotp.group import TPGroup


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
    """

    losses: int = 0
    kept: bool = False
    spent: bool = False
    replaced: bool = False

    def may_overwrite(self) -> bool:
        """Whether the only loss may write its gradient here; it does so when told yes."""
        self.spent = self.losses == 1 and not self.kept
        return self.spent

    def check(self) -> None:
        """RuntimeError unless the memory holds the logits."""
        if self.spent:
            raise RuntimeError(
                "these logits are used for the first time after the backward pass, which has "
                "written their gradient in their place; use outputs.logits before loss.backward(), "
                "or set tensor_parallel.vocab_parallel_lm_head to false"
            )
        if self.replaced:
            raise RuntimeError(
                "these logits were changed in place through another view of them; use the view "
                "that was changed, or change a clone"
            )
