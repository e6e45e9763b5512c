# SPDX-License-Identifier: Apache-2.0
"""Whether anything draws random numbers, seen by the state of a generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that operators on ``device`` draw from."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured, in which an RNG state can neither be read nor exchanged."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Observation:
    """Whether anything but sharded regions changes the state of a generator.

    ``first`` is the state at its begin.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.first = self._expected = generator.get_state()
        self.has_drawn = False

    def look(self) -> None:
        """Compare the state with that of the last change."""
        self.has_drawn |= not torch.equal(self.generator.get_state(), self._expected)

    def expect(self) -> None:
        """The state was changed by a region."""
        self._expected = self.generator.get_state()


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Of the arguments of a forward."""
    return next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))


def run_without_draws(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """``forward`` of experts whose outputs the ranks sum; RuntimeError where it draws random
    numbers, which may be meant for a rank's own features or for the sum."""
    given = first_tensor(args, kwargs)
    if torch.compiler.is_compiling() or is_capturing(given.device):
        return forward(*args, **kwargs)
    observed = Observation(default_generator(given.device))
    output = forward(*args, **kwargs)
    observed.look()
    if observed.has_drawn:
        raise RuntimeError(
            "experts whose features are sharded drew random numbers in their forward, and it "
            "is not known whether for the features of a rank or for the output of all; set "
            "their dropout probability to 0, or leave them replicated with partition_type "
            "'skip'"
        )
    return output
