# SPDX-License-Identifier: Apache-2.0
"""The form of an estimate, which ``autotp plan --json`` prints; docs/planning.md describes it.

Sizes are bytes unless a name says otherwise, times seconds, and lists over ranks are in rank order.
Keys are added, and what a key means is not changed, without another ``version``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

VERSION = 1


@dataclass(frozen=True, slots=True)
class Row:
    """Parameters that differ in indices only and are treated alike; a tied one has no bytes."""

    pattern: str
    count: int
    kind: str
    source: str
    rule: str
    dtype: str
    trains: bool
    shape: tuple[int, ...]
    local_shapes: tuple[tuple[int, ...], ...]
    bytes: int
    bytes_per_rank: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockKind:
    """Blocks of a stack that are alike: ``first`` is the index of the first of ``count``."""

    name: str
    first: int
    count: int
    patterns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """A list of blocks of the model, by the name of its module."""

    name: str
    count: int
    kinds: tuple[BlockKind, ...]


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What a TP rank needs, of its data-parallel ranks the one that holds most.

    ``after_backward``  what is held between backward and step
    ``in_step``         the moment of forward and backward at which most is held, and
    ``in_optimizer``    that of the optimizer's step; both by kind
    ``peak``            the larger of their sums
    """

    rank: int
    elements: int
    trained_elements: int
    after_backward: Mapping[str, int]
    in_step: Mapping[str, int]
    in_optimizer: Mapping[str, int]
    peak: int


@dataclass(frozen=True, slots=True)
class Activations:
    """Where activations and TP collectives come from, of one rank.

    ``source``  "traced", "formula", or "none" where no ``--seq`` was given
    ``reason``  why they were not traced, or what was assumed
    ``peak``    most bytes beside weights, gradients and optimizer
    """

    source: str
    reason: str
    rank: int
    sequences: int
    tokens: int
    peak: int
    saved_for_backward: int
    logits: int
    blocks_traced: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Collective:
    """Collectives of one step that are alike, as a rank takes part in them.

    ``size``  bytes that a rank gives to each: the full tensor of an all-reduce or a reduce-scatter,
    the own shard of an all-gather. ``between`` is "tp" or "replicas". ``seconds`` are those of all,
    None without a bandwidth.
    """

    kind: str
    between: str
    ranks: int
    module: str
    phase: str
    count: int
    size: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Settings:
    """What the estimate is for."""

    replicas: int
    zero_stage: int
    optimizer: str
    dtype: str
    gradient_checkpointing: bool
    lora: str | None
    bandwidth: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """All of it."""

    model: str
    tp_size: int
    settings: Settings
    bytes: int
    bytes_per_rank: tuple[int, ...]
    parameters: tuple[Row, ...]
    stacks: tuple[Stack, ...]
    ranks: tuple[RankMemory, ...]
    activations: Activations
    collectives: tuple[Collective, ...]
    warnings: tuple[str, ...]
    messages: tuple[str, ...]

    def content(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"format": "deepspeed_autotp.estimate", "version": VERSION, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to use the GPUs: sizes, the largest peak of its ranks, communication of a step."""

    tp_size: int
    replicas: int
    zero_stage: int
    peak: int
    communication_seconds: float
    fits: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The layouts of ``gpus`` GPUs with ``memory`` bytes each, the best first.

    ``notes`` say what is left out, or not counted.
    """

    model: str
    gpus: int
    memory: int
    bandwidth: float
    layouts: tuple[Layout, ...]
    notes: tuple[str, ...]

    def content(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"format": "deepspeed_autotp.suggestion", "version": VERSION, **asdict(self)}
