# SPDX-License-Identifier: Apache-2.0
"""Random numbers of the part of a block in which every rank computes something else.

Between column entry and row exit a rank draws for its own heads or features. Ranks that hold
other numbers of them would leave that part with other random states, and the next dropout over
what all ranks hold would differ between them. Such ranks have numbers of their own there, as
Megatron-LM's model-parallel random state gives them, and take up the common ones at the exit.
Ranks with equal numbers stay in step by themselves, and draw the same there.
"""

from __future__ import annotations

import hashlib

import torch


class Fork:
    """One per group. ``enter`` at a column layer, ``leave`` at a row layer."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._common: torch.Tensor | None = None
        self._seed = 0

    def enter(self, device: torch.device) -> None:
        """Leave the common random numbers; nothing where that has been done."""
        generator = _generator(device)
        if self._is_inside(generator):
            return
        common = generator.get_state()
        # The states of both kinds of generator lie on the host: no device is waited for.
        digest = hashlib.blake2b(bytes(common.numpy()), digest_size=7).digest()
        self._seed = int.from_bytes(digest, "little") + self._rank
        self._common = common
        generator.manual_seed(self._seed)

    def leave(self, device: torch.device) -> None:
        """Take up the common random numbers, behind where they were; nothing outside."""
        generator = _generator(device)
        if self._is_inside(generator):
            assert self._common is not None
            generator.set_state(self._common)
            # Or the next part would begin where this one did, with the same numbers.
            if device.type == "cuda":
                generator.set_offset(generator.get_offset() + 4)
            else:
                torch.empty(()).random_(generator=generator)
        self._common = None

    def _is_inside(self, generator: torch.Generator) -> bool:
        """Another seed means that somebody has put another state in place, as activation
        checkpointing does when a recomputation ends early; what was entered is left then."""
        return self._common is not None and generator.initial_seed() == self._seed


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
