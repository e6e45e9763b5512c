# SPDX-License-Identifier: Apache-2.0
"""What a trace is asked for and what it finds; made by trace.py, read without torch."""

from __future__ import annotations

from dataclasses import dataclass

from deepspeed_autotp import _core


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a micro-batch: sequences, and tokens of each."""

    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Collectives:
    """Those of a step that are alike; ``size`` is what this rank gives to each, in bytes."""

    kind: str
    size: int
    ranks: int
    module: str
    phase: str
    count: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What a rank has alive beside weights, gradients and optimizer, and sends over its TP group.

    ``parts``  as :func:`_core.timeline_peak` takes them
    ``saved``  bytes that the forward leaves for the backward pass
    ``blocks``  that were run, of how many: ``2 of 80``
    """

    parts: tuple[tuple[tuple[int, int], tuple[tuple[int, int], ...], int], ...]
    saved: int
    logits: int
    collectives: tuple[Collectives, ...]
    blocks: str
    seconds: float

    def peak(self, share: float) -> tuple[int, int]:
        """(activations, gradients) in bytes where activations + share * gradients is largest."""
        return _core.timeline_peak(self.parts, share)
