# SPDX-License-Identifier: Apache-2.0
"""Models that ``autotp check`` is given as module:factory."""

import torch
from torch import Tensor, nn

from tests.support.custom_models import Language, build


def interleaved() -> Language:
    """Its q|k|v projection has the three of the first head, then of the second, ..."""
    return build("interleaved q|k|v")


class TakesText(nn.Module):
    """Nobody knows its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, text: str) -> Tensor:
        y: Tensor = self.down(self.up.weight[: len(text)])
        return y


def takes_text() -> TakesText:
    return TakesText()


def vectors() -> dict[str, Tensor]:
    """Keyword arguments of a Sequential."""
    return {"input": torch.arange(128.0).view(2, 64) / 128}


def diverging() -> dict[str, Tensor]:
    """Nothing trains with them."""
    return {"input": torch.full((2, 64), torch.inf)}


def two_linears() -> nn.Sequential:
    """Takes vectors; its buffer has another value each time."""
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    model.register_buffer("drawn", torch.randn(3))
    return model
