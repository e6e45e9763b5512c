# SPDX-License-Identifier: Apache-2.0
"""Quantised weights replaced by their shards: whole blocks, with the scales that they have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deepspeed_autotp._core import Entry
from deepspeed_autotp.interop.bitsandbytes import (
    block_bytes,
    block_size,
    packed_blocks,
    set_blocks,
)
from deepspeed_autotp.native import packing


@torch.no_grad()
def shard_quantized(weight: Tensor, entry: Entry, *, rank: int) -> Callable[[], None]:
    """Let a weight in 4 bits be its shard on ``rank``; returns the undo, which keeps the full
    weight."""
    outer, size, runs = entry.blocks(rank, block_size(weight))
    count = sum(runs[1::2])
    elements, scales = (
        packing.pack(
            tensor.contiguous(),
            view=(outer, size, each),
            runs=runs,
            shape=(outer * count * each,),
        )
        for tensor, each in zip(packed_blocks(weight), (block_bytes(weight), 1), strict=True)
    )
    return set_blocks(weight, elements, scales, entry.local_shape(rank))
