# SPDX-License-Identifier: Apache-2.0
"""A model that no library knows: fused q|k|v with fewer key/value heads, fused gate|up, biases."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, HEADS, KEYS, SIZE, INNER = 32, 4, 4, 8, 48
QUERY_WIDTH, KEY_WIDTH = HEADS * SIZE, KEYS * SIZE

# As a user writes it for this model; q, k, v are listed, gate and up are two equal pieces.
PARTITION: dict[str, Any] = {
    "use_default_specs": False,
    "layer_specs": [
        {
            "patterns": [r".*\.qkv\.weight$"],
            "partition_type": "column",
            "shape": [[QUERY_WIDTH, KEY_WIDTH, KEY_WIDTH], -1],
        },
        {"patterns": [r".*\.gate_up\.weight$"], "partition_type": "column", "shape": [2, -1]},
        {"patterns": [r".*\.(out|down)\.weight$"], "partition_type": "row"},
    ],
}


class Attention(nn.Module):
    """Everything follows from the width of what the projection gives."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, QUERY_WIDTH + 2 * KEY_WIDTH)
        self.out = nn.Linear(QUERY_WIDTH, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, SIZE)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        out: torch.Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(HIDDEN, 2 * INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y: torch.Tensor = self.down(F.silu(gate) * up)
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.mlp = Mlp()
        self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norms[0](x))
        y: torch.Tensor = x + self.mlp(self.norms[1](x))
        return y


class Handmade(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(layers)])

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return (x - target).square().mean()


def build_handmade(seed: int = 0, layers: int = 2) -> Handmade:
    torch.manual_seed(seed)
    return Handmade(layers)


def example(step: int = 0, *, rows: int = 4) -> dict[str, torch.Tensor]:
    """Inputs of :class:`Handmade`, the same on every rank."""
    draw = torch.Generator().manual_seed(100 + step)
    return {
        "x": torch.randn(rows, 6, HIDDEN, generator=draw),
        "target": torch.randn(rows, 6, HIDDEN, generator=draw),
    }


def single_curve(model: nn.Module, *, rate: float, steps: int = 3) -> list[float]:
    """Losses of plain SGD in one process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    losses = []
    for step in range(steps):
        loss = model(**example(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
