# SPDX-License-Identifier: Apache-2.0
"""The gradient norm of a model whose shards are those of layers that others have made parallel."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed_autotp.interop.deepspeed.parameters import is_shard_of_others


class MarkedNorm:
    """As ``state.grad_norm.GradNorm``: a parameter that is marked as a shard counts on each rank of
    ``handle``, any other on TP rank 0."""

    def __init__(self, handle: dist.ProcessGroup, *, device: torch.device) -> None:
        self._handle = handle
        self._rank = dist.get_rank(handle)
        self._device = device

    def counted(self, gradient: Tensor, parameter: Tensor, *, first: int = 0) -> Tensor:
        """The gradient where this rank counts it, else one without elements."""
        counts = self._rank == 0 or is_shard_of_others(parameter)
        return gradient if counts else gradient.new_zeros(0)

    def is_partly_counted(self, parameter: Tensor) -> bool:
        """No rank holds what another one has, too."""
        return False

    def of(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """The norm in float64; ``pairs`` are parameters with gradients. All ranks call it."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for parameter, gradient in pairs:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            total += self.counted(gradient, parameter).to(dtype).square().sum()
        dist.all_reduce(total, group=self._handle)
        return total.sqrt()

    @torch.no_grad()
    def clip(self, model: nn.Module, most: float) -> Tensor:
        """Scale the gradients of ``model`` so that their norm is at most ``most``; returns the norm
        before."""
        pairs = [(p, p.grad) for p in model.parameters() if p.grad is not None]
        norm = self.of(pairs)
        scale = (most / (norm + 1e-6)).clamp(max=1.0)
        for _, gradient in pairs:
            gradient.mul_(scale.to(gradient.device, gradient.dtype))
        return norm.float()
