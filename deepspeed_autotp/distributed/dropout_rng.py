# SPDX-License-Identifier: Apache-2.0
"""RNG states of the sharded region of a block, between a column layer and its row layer.

In the sharded region a rank draws random numbers for its own heads or features. Where ranks have
different widths, they consume different amounts, and after the region their RNG states would
differ: the next dropout over replicated activations would use another mask on each rank. Such
ranks use a seed of their own in the sharded region, as Megatron-LM's model-parallel RNG state, and
continue with the common state after it. Ranks of equal width consume the same amount and need no
state of their own.
"""

from __future__ import annotations

import hashlib

import torch


class TensorParallelRNG:
    """The RNG state of one TP group: the common one, and inside a sharded region this rank's."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._common: torch.Tensor | None = None
        self._seed = 0

    def enter_region(self, device: torch.device) -> None:
        """At a column layer: use this rank's RNG state; no effect inside the region."""
        generator = _generator(device)
        if self._is_inside(generator):
            return
        common = generator.get_state()
        # The states of CPU and CUDA generators are CPU tensors: no device is waited for.
        digest = hashlib.blake2b(bytes(common.numpy()), digest_size=7).digest()
        self._seed = int.from_bytes(digest, "little") + self._rank
        self._common = common
        generator.manual_seed(self._seed)

    def leave_region(self, device: torch.device) -> None:
        """At a row layer: back to the common RNG state, advanced; no effect outside a region."""
        generator = _generator(device)
        if self._is_inside(generator):
            assert self._common is not None
            generator.set_state(self._common)
            # Without the advance the next region would derive the same seed as this one.
            if device.type == "cuda":
                generator.set_offset(generator.get_offset() + 4)
            else:
                torch.empty(()).random_(generator=generator)
        self._common = None

    def _is_inside(self, generator: torch.Generator) -> bool:
        """Another seed means that another state was set in between, as activation checkpointing
        does when a recomputation ends early; the region is over then."""
        return self._common is not None and generator.initial_seed() == self._seed


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
