# SPDX-License-Identifier: Apache-2.0
"""Random numbers of the part of a block in which every rank computes something else.

Between column entry and row exit a rank draws for its own heads. Ranks with other numbers of
heads would leave that part with other random states, and the next dropout over what all ranks
hold would differ between them. So each rank has numbers of its own there, as Megatron-LM's
model-parallel random state gives them, and takes up the common ones at the exit.
"""

from __future__ import annotations

import torch


class Fork:
    """One per group. ``enter`` at a column layer, ``leave`` at a row layer."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._common: torch.Tensor | None = None

    def enter(self, device: torch.device) -> None:
        """Leave the common random numbers; nothing where that has been done."""
        if self._common is not None:
            return
        generator = _generator(device)
        # The ranks draw the same, and go on from there when they leave.
        seed = int(torch.empty((), dtype=torch.int64, device=device).random_(generator=generator))
        self._common = generator.get_state()
        generator.manual_seed(seed + self._rank)

    def leave(self, device: torch.device) -> None:
        """Take up the common random numbers; nothing outside such a part."""
        if self._common is not None:
            _generator(device).set_state(self._common)
            self._common = None


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
