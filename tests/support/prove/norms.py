# SPDX-License-Identifier: Apache-2.0
"""Norms, and dropout whose masks are kept and can be replayed."""

import torch
from torch import Tensor, nn

from tests.support.prove.case import Case

RATE = 0.2


class RMS(nn.Module):
    """As most models have it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def make_norm(case: Case) -> nn.Module:
    kinds = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "own rms": RMS}
    return kinds[case.norm](case.hidden) if case.norm in kinds else nn.Identity()


class Dropout(nn.Dropout):
    """Keeps the masks of all its calls; with ``replayed`` takes those one after the other.

    ``dim`` is the dimension that may be sharded, ``size`` its full size.
    """

    def __init__(self, dim: int, size: int) -> None:
        super().__init__(RATE)
        self.dim, self.size = dim, size
        self.seen: list[Tensor] = []
        self.replayed: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.replayed is not None:
            return x * self.replayed.pop(0)
        mask = super().forward(torch.ones_like(x))
        self.seen.append(mask.detach())
        return x * mask
