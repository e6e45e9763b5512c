# SPDX-License-Identifier: Apache-2.0
"""Norms over sharded features.

T is the number of tokens, F the features, R the ranks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deepspeed_autotp.distributed.autograd_collectives import (
    gather_from_tp_region,
    scatter_to_tp_region,
)
from deepspeed_autotp.layers.layer_sharding import sharding_of


class GatheredNorm(nn.Module):
    """A norm over features that are sharded, with a replicated weight; mixed into its class.

    x  [T, F/R]   this rank's shard
    y  [T, F/R]   = this rank's shard of norm(x of all ranks)

    forward   all-gather of x
    backward  all-gather of dy
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        s = sharding_of(self)
        y = super().forward(gather_from_tp_region(x, s.layout, s.group), *args, **kwargs)
        return scatter_to_tp_region(y, s.layout, s.group)
