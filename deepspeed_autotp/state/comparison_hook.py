# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a TP group compare in some of the calls of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from deepspeed_autotp.distributed.rng_observation import is_capturing


class ComparisonHook(ABC):
    """A forward pre-hook that compares in call ``first``, a power of two, and whenever the number
    of calls has doubled since. Not under torch.compile, nor while a CUDA graph is captured."""

    def __init__(self, *, first: int) -> None:
        self._first = first
        self._calls = 0

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        if torch.compiler.is_compiling():  # the comparison would break the graph
            return
        self._calls += 1
        if self._calls < self._first or self._calls.bit_count() > 1:
            return
        if not is_capturing(next(module.parameters()).device):
            self.compare(module, call=self._calls)

    @abstractmethod
    def compare(self, module: nn.Module, *, call: int) -> None:
        """All ranks of the TP group make the same call."""
