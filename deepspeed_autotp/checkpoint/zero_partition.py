# SPDX-License-Identifier: Apache-2.0
"""Which elements of which parameter each data-parallel rank has in DeepSpeed's optimizer.

A unit is what the optimizer has a state for: without ZeRO a parameter, under ZeRO 1 and 2 a
parameter group, under ZeRO 3 a sub-group. Under ZeRO it is one flat tensor on each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Under ZeRO 1 and 2 a flat group is a multiple of this many elements on each rank
# (nccl_start_alignment_factor in runtime/zero/stage_1_and_2.py and runtime/bf16_optimizer.py).
_ALIGNMENT = 2

Sizes = Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Piece:
    """``numel`` elements of the shard of a parameter, from ``begin`` on, are in a partition from
    ``start`` on."""

    name: str
    begin: int
    start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Partition:
    """What one data-parallel rank has of a unit: ``size`` elements, the last ``padding`` unused."""

    size: int
    padding: int
    pieces: tuple[Piece, ...]


def one_parameter(name: str, numel: int) -> list[Partition]:
    """Without ZeRO: every data-parallel rank has the same."""
    return [Partition(numel, 0, (Piece(name, 0, 0, numel),))]


def flat_partitions(sizes: Sizes, replicas: int) -> list[Partition]:
    """Of ZeRO 1 and 2: the parameters of a group follow one another, in equal parts."""
    total = sum(numel for _, numel in sizes)
    alignment = _ALIGNMENT * replicas
    size = -(-total // alignment) * alignment // replicas
    partitions = []
    for rank in range(replicas):
        first, last = rank * size, (rank + 1) * size
        pieces, at = [], 0
        for name, numel in sizes:
            begin, end = max(at, first), min(at + numel, last)
            if begin < end:
                pieces.append(Piece(name, begin - at, begin - first, end - begin))
            at += numel
        padding = min(size, max(0, last - total))
        partitions.append(Partition(size, padding, tuple(pieces)))
    return partitions


def own_partitions(sizes: Sizes, replicas: int) -> list[Partition]:
    """Of ZeRO 3: each parameter is in equal parts, the last of them filled up."""
    partitions = []
    for rank in range(replicas):
        pieces, start = [], 0
        for name, numel in sizes:
            part = own_share(numel, replicas)
            held = min(part, numel - rank * part)
            if held > 0:
                pieces.append(Piece(name, rank * part, start, held))
            start += part
        partitions.append(Partition(start, 0, tuple(pieces)))
    return partitions


def own_share(numel: int, replicas: int) -> int:
    """Elements of a parameter that each rank has under ZeRO 3, filling included."""
    return -(-numel // replicas)


def sub_groups(sizes: Sizes, replicas: int, most: int) -> list[list[str]]:
    """The sub-groups of ZeRO 3 (``_create_fp16_sub_groups``): each ends where it has ``most``."""
    groups: list[list[str]] = [[]]
    held = 0
    if most >= sum(own_share(numel, replicas) for _, numel in sizes):
        return [[name for name, _ in sizes]]
    for index, (name, numel) in enumerate(sizes):
        groups[-1].append(name)
        held += own_share(numel, replicas)
        if held >= most and index < len(sizes) - 1:
            groups.append([])
            held = 0
    return groups
