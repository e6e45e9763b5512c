# SPDX-License-Identifier: Apache-2.0
"""Shards on another device of tensors that are on the CPU.

Of the full tensor only this rank's runs are read. They are packed into one of two pinned buffers
while the other one is being copied, so that packing hides behind the copy; the CPU needs no other
memory, the device memory for the shard alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed_autotp.native import packing

__all__ = ["PinnedCopy"]

# Two of them fit into the cache of most CPUs, and a copy of one takes ten times what starting it
# does. Where the last cache has 32 MiB, packing into 32 MiB takes 1.2 to 1.5 times as long.
_BUFFER = 8 << 20


class PinnedCopy:
    """Two buffers on the way to ``device``: pinned for a GPU, else plain memory.

    From plain memory a copy is waited for, since nothing says when it has left.
    """

    def __init__(self, device: torch.device, *, buffer: int = _BUFFER) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._buffers = [
            torch.empty(buffer, dtype=torch.uint8, pin_memory=self._pinned) for _ in range(2)
        ]
        self._left: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def shard(self, full: Tensor, shard_slice: packing.ShardSlice) -> Tensor:
        """The shard of a tensor on the CPU; complete in the device's current stream."""
        shard = torch.empty(list(shard_slice.shape), dtype=full.dtype, device=self._device)
        source = full.detach().resolve_conj().resolve_neg().contiguous()
        target = shard.view(-1).view(torch.uint8)
        begin = 0
        for piece in target.split(self._buffers[0].numel()):
            part = self._next_buffer()[: piece.numel()]
            packing.pack_part_(part, source, shard_slice, begin=begin)
            piece.copy_(part, non_blocking=self._pinned)
            self._sent()
            begin += piece.numel()
        return shard

    def full(self, full: Tensor) -> Tensor:
        """All of a tensor on the CPU."""
        items = full.numel()
        runs = (0, items) if items else ()
        return self.shard(full, packing.ShardSlice(view=(1, items, 1), runs=runs, shape=full.shape))

    def _next_buffer(self) -> Tensor:
        """The buffer whose turn it is, once it has left."""
        left = self._left[self._turn]
        if left is not None:
            left.synchronize()
        return self._buffers[self._turn]

    def _sent(self) -> None:
        if self._pinned:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._left[self._turn] = event
        self._turn = 1 - self._turn
