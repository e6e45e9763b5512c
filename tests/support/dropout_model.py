# SPDX-License-Identifier: Apache-2.0
"""A model with dropout everywhere, whose masks can be looked at."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deepspeed_autotp

SIZE = 4  # of a head
RATE = 0.3

Masks = dict[str, list[Tensor]]

PARTITION: dict[str, Any] = {
    "use_default_specs": False,
    "layer_specs": [
        {
            "patterns": [r".*\.(q|k|v)_proj\.weight$", r".*\.up\.weight$"],
            "partition_type": "column",
        },
        {"patterns": [r".*\.(o_proj|down)\.weight$"], "partition_type": "row"},
    ],
}


class SeenDropout(nn.Dropout):
    """Keeps the masks of all its calls."""

    def __init__(self, p: float = RATE) -> None:
        super().__init__(p)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = super().forward(torch.ones_like(x))
        if not torch.compiler.is_compiling():
            self.seen.append(mask.detach())
        return x * mask


class Attention(nn.Module):
    def __init__(self, heads: int, rate: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, SIZE
        width = heads * SIZE
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.attention_dropout, self.residual_dropout = SeenDropout(rate), SeenDropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(x).unflatten(-1, (self.num_heads, SIZE)).transpose(1, 2) for f in layers)
        weights = (q @ k.transpose(-1, -2) / SIZE**0.5).softmax(-1)
        y = self.attention_dropout(weights) @ v
        out: Tensor = self.residual_dropout(self.o_proj(y.transpose(1, 2).flatten(2)))
        return out


class Mlp(nn.Module):
    def __init__(self, heads: int, rate: float) -> None:
        super().__init__()
        width = heads * SIZE
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.inner_dropout, self.residual_dropout = SeenDropout(rate), SeenDropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner_dropout(F.gelu(self.up(x)))
        out: Tensor = self.residual_dropout(self.down(y))
        return out


class Block(nn.Module):
    def __init__(self, heads: int, rate: float) -> None:
        super().__init__()
        width = heads * SIZE
        self.attention, self.mlp = Attention(heads, rate), Mlp(heads, rate)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = SeenDropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x + self.attention(self.norm_1(x)))
        y: Tensor = x + self.mlp(self.norm_2(x))
        return y


class DropoutModel(nn.Module):
    """``checkpoint`` runs a block in training; None: nothing is checkpointed."""

    def __init__(self, heads: int, rate: float) -> None:
        super().__init__()
        self.embedding_dropout = SeenDropout(rate)
        self.blocks = nn.ModuleList([Block(heads, rate) for _ in range(2)])
        self.checkpoint: Callable[[nn.Module, Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding_dropout(x)
        for block in self.blocks:
            if self.checkpoint is None or not self.training:
                x = block(x)
            else:
                x = self.checkpoint(block, x)
        return x

    def dropouts(self) -> Iterator[tuple[str, SeenDropout]]:
        """All dropouts, by name."""
        for name, module in self.named_modules():
            if isinstance(module, SeenDropout):
                yield name, module


def build_dropout_model(
    heads: int = 4, *, rate: float = RATE, reentrant: bool | None = None
) -> DropoutModel:
    """``reentrant``: how torch's checkpoints of the blocks are; None: there are none."""
    torch.manual_seed(0)
    model = DropoutModel(heads, rate)
    if reentrant is not None:
        model.checkpoint = functools.partial(checkpoint, use_reentrant=reentrant)
    return model


def inputs(heads: int, step: int = 0, *, rows: int = 3, length: int = 5) -> Tensor:
    """The same on every rank; they need a gradient, for re-entrant checkpoints."""
    draw = torch.Generator().manual_seed(100 + step)
    return torch.randn(rows, length, heads * SIZE, generator=draw).requires_grad_()


def shard(model: nn.Module, heads: int, *, sequence: bool = False) -> None:
    """Over all ranks of the run."""
    deepspeed_autotp.parallelize(
        model,
        tp_size=dist.get_world_size(),
        config={"partition_config": PARTITION, "sequence_parallel": sequence},
        example_inputs={"x": inputs(heads)},
    )


def masks_of(model: DropoutModel) -> Masks:
    """All masks since the last call, by dropout."""
    found = {name: list(module.seen) for name, module in model.dropouts()}
    for _, module in model.dropouts():
        module.seen.clear()
    return found
