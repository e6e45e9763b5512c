# SPDX-License-Identifier: Apache-2.0
"""Modules that know of sharded regions: those that hold one, and dropouts that stand elsewhere.

Each is mixed into the class of the module it replaces.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deepspeed_autotp.interop.module_state import state_of
from deepspeed_autotp.layers.forward_context import ForwardContext


class RegionBlock(nn.Module):
    """A module whose forward runs column layers and the row layers behind them.

    A sharded region that begins in its forward ends there, also by an exception.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rng = state_of(self, ForwardContext).rng
        if not torch.compiler.is_compiling() and rng.is_outside:
            return rng.run_outside(self, super().forward, args, kwargs)
        if not rng.is_active:
            return super().forward(*args, **kwargs)
        return rng.run_block(super().forward, args, kwargs)


class _PlacedDropout(nn.Module):
    """Dropout whose activation is not what its place in or outside of a region says."""

    sharded: ClassVar[bool]

    def forward(self, x: Tensor) -> Any:
        rng = state_of(self, ForwardContext).rng
        is_alone = not torch.compiler.is_compiling() and rng.is_outside
        if not rng.is_active or (is_alone and not self.training):
            return super().forward(x)
        return rng.run_dropout(super().forward, x, sharded=self.sharded)


class ReplicatedDropout(_PlacedDropout):
    """Dropout of what all ranks have, within a sharded region: all ranks draw one mask.

    An adapter drops the input of a column layer behind it, and DeBERTa its position embeddings
    behind the queries.
    """

    sharded = False


class ShardedDropout(_PlacedDropout):
    """Dropout of a rank's own features, outside of a region: each rank draws its own mask.

    An adapter drops the input of a row layer behind it.
    """

    sharded = True
