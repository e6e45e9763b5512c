# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weight is sharded: column and row, also of GPT-2's transposed Conv1D.

A module is converted in place by giving it one of these classes (class_swap.py). T is the number of
tokens, I and O are input and output features, R the ranks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed_autotp.layers.drawn_weights import DrawnInFull, ResetInFull
from deepspeed_autotp.layers.layer_sharding import sharding_of


class ColumnLinear(ResetInFull, nn.Linear):
    """Linear whose output features are sharded.

    x  [T, I]     replicated
    w  [O/R, I]   this rank's rows
    y  [T, O/R]   = x @ w.T + b, or [T, O] with ``gather_output``

    forward   no communication (all-gather with ``gather_output``)
    backward  all-reduce of dx
    """

    @property
    def gather_output(self) -> bool:
        """Whether it gives its full output, under the name that DeepSpeed's LinearLayer has."""
        return sharding_of(self).gather_output

    def forward(self, x: Tensor) -> Tensor:
        s = sharding_of(self)
        s.enter_region(x)
        y = s.context.input.linear(x, self.weight, self.bias, siblings=s.siblings)
        return s.gather(y, s) if s.gather_output else y


class RowLinear(ResetInFull, nn.Linear):
    """Linear whose input features are sharded.

    x  [T, I/R]   this rank's shard, or [T, I] with ``split_input``
    w  [O, I/R]   this rank's columns
    y  [T, O]     = sum over ranks of x @ w.T, then + b once

    forward   all-reduce of the output
    backward  no communication (all-gather of dx with ``split_input``)
    """

    def forward(self, x: Tensor) -> Tensor:
        return sharding_of(self).row_output(x, lambda own: F.linear(own, self.weight), self.bias)


class ColumnConv1D(DrawnInFull):
    """GPT-2's transposed linear, ``w [I, O/R]``; otherwise as :class:`ColumnLinear`."""

    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        s = sharding_of(self)
        s.enter_region(x)
        y = s.context.input.linear(x, self.weight, self.bias, siblings=s.siblings, transposed=True)
        return s.gather(y, s) if s.gather_output else y


class RowConv1D(DrawnInFull):
    """GPT-2's transposed linear, ``w [I/R, O]``; otherwise as :class:`RowLinear`."""

    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        s = sharding_of(self)
        return s.row_output(x, lambda own: F.linear(own, self.weight.t()), self.bias)
