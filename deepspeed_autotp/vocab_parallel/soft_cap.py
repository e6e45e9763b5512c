# SPDX-License-Identifier: Apache-2.0
"""The soft cap of logits, c tanh(x / c), as three elementwise steps that may be deferred.

Knows nothing of how logits are sharded, or of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """``torch.div`` or ``torch.mul`` by ``number``, or ``torch.tanh``."""

    operation: Callable[..., Tensor]
    number: float = 0.0


Steps = tuple[Step, ...]


def follows(step: Step, steps: Steps) -> bool:
    """Whether ``step`` continues a soft cap that ``steps`` begin."""
    if not steps:
        return step.operation is torch.div and 0 < step.number < float("inf")
    if len(steps) == 1:
        return step.operation is torch.tanh
    return len(steps) == 2 and step.operation is torch.mul and step.number == steps[0].number


def cap_of(steps: Steps) -> float:
    """c of a complete soft cap, 0 of an incomplete one."""
    return steps[0].number if len(steps) == 3 else 0.0


@dataclass(slots=True, eq=False)
class Derivative:
    """What the backward of steps needs of their values, once these are computed.

    ``tanh`` is the result of that step, or None where there is no such step.
    """

    steps: Steps
    tanh: Tensor | None = None

    def values(self, x: Tensor) -> Tensor:
        """The result of the steps on ``x``, which is not changed."""
        for step in self.steps:
            if step.operation is torch.tanh:
                # In place of the quotient, which nothing else refers to.
                x = self.tanh = x.tanh_()
            else:
                x = step.operation(x, step.number)
        return x

    def gradient(self, dy: Tensor, *, again: bool) -> Tensor:
        """The gradient of x, as autograd computes it; ``again`` keeps what a second call needs."""
        dx, given = torch.empty_like(dy), dy
        for step in reversed(self.steps):
            if step.operation is torch.tanh:
                torch.ops.aten.tanh_backward.grad_input(given, self._known(), grad_input=dx)
            else:
                step.operation(given, step.number, out=dx)
            given = dx
        if not again:
            self.tanh = None
        return dx

    def _known(self) -> Tensor:
        if self.tanh is None:
            raise RuntimeError(
                "trying to backward through these logits a second time; call the first backward "
                "with retain_graph=True"
            )
        return self.tanh
