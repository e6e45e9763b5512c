# SPDX-License-Identifier: Apache-2.0
"""Column and row layers whose frozen weight is in 4 bits, with bitsandbytes.

A shard has whole blocks of the full weight, so that a rank's product is that with the same values.
"""

from __future__ import annotations

from torch import Tensor, nn

from deepspeed_autotp.interop.bitsandbytes import product_4bit
from deepspeed_autotp.layers.layer_sharding import sharding_of


class ColumnLinear4bit(nn.Linear):
    """As :class:`ColumnLinear`; its weight has no gradient.

    x  [T, I]     replicated
    w  [O/R, I]   this rank's rows
    y  [T, O/R]   = x @ w.T + b, or [T, O] with ``gather_output``

    forward   no communication (all-gather with ``gather_output``)
    backward  all-reduce of dx
    """

    def forward(self, x: Tensor) -> Tensor:
        s = sharding_of(self)
        s.enter_region(x)
        x = s.context.input.shared(x, siblings=s.siblings)
        y = product_4bit(self, x, self.bias)
        return s.gather(y, s) if s.gather_output else y


class RowLinear4bit(nn.Linear):
    """As :class:`RowLinear`; its weight has no gradient.

    x  [T, I/R]   this rank's shard, or [T, I] with ``split_input``
    w  [O, I/R]   this rank's columns
    y  [T, O]     = sum over ranks of x @ w.T, then + b once

    forward   all-reduce of the output
    backward  no communication (all-gather of dx with ``split_input``)
    """

    def forward(self, x: Tensor) -> Tensor:
        s = sharding_of(self)
        return s.row_output(x, lambda own: product_4bit(self, own, None), self.bias)
