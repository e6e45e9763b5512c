# SPDX-License-Identifier: Apache-2.0
"""Geometry: areas that are proportional to bytes, and the shards of a weight in one of them.

Lengths are CSS pixels; y grows downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepspeed_autotp._core import Entry, Kind

# Kinds that are drawn as strips from left to right; others from top to bottom.
_FROM_LEFT = (Kind.COLUMN, Kind.HIDDEN)
# Of one box. More strips than these are no longer seen.
_MOST_STRIPS = 128
# Of a weight that has one matrix for each expert, and the area of each at least.
_MOST_TILES, _LEAST_TILE = 8, 600.0
# What is thinner is not seen.
_THINNEST = 0.4
# The background that is seen between cells.
_GAP = 2.0


@dataclass(frozen=True, slots=True)
class Box:
    x: float
    y: float
    width: float
    height: float

    def part(self, start: float, length: float, *, from_left: bool) -> Box:
        """``length`` of it from ``start`` on, both as shares of 1."""
        if from_left:
            return Box(self.x + start * self.width, self.y, length * self.width, self.height)
        return Box(self.x, self.y + start * self.height, self.width, length * self.height)

    def inside(self, margin: float) -> Box:
        """Without a margin at its sides, but never less than half of it."""
        across, down = min(margin, self.width / 4), min(margin, self.height / 4)
        return Box(self.x + across, self.y + down, self.width - 2 * across, self.height - 2 * down)


@dataclass(frozen=True, slots=True)
class Strips:
    """What rank ``rank`` holds of a weight; None: every rank holds all of it."""

    rank: int | None
    boxes: tuple[Box, ...]


def divided(box: Box, sizes: Sequence[int]) -> list[Box]:
    """A box for each size, in order, with areas that are proportional to the sizes.

    The list is divided where its halves are most nearly equal, along the longer side, and so on
    with the halves (an ordered treemap).
    """
    if len(sizes) <= 1:
        return [box] * len(sizes)
    total, before = sum(sizes), 0
    if total == 0:
        return [Box(box.x, box.y, 0.0, 0.0)] * len(sizes)
    halves = []
    for count, size in enumerate(sizes[:-1], start=1):
        before += size
        halves.append((abs(total - 2 * before), count, before / total))
    _, count, share = min(halves)
    from_left = box.width >= box.height
    first = box.part(0.0, share, from_left=from_left)
    rest = box.part(share, 1.0 - share, from_left=from_left)
    return [*divided(first, sizes[:count]), *divided(rest, sizes[count:])]


def with_gap(box: Box) -> Box:
    """A cell, with the background that is seen around it."""
    return box.inside(_GAP / 2)


def strips_of(entry: Entry, ranks: int, box: Box) -> tuple[Strips, ...]:
    """The runs of each rank in ``box``, which stands for the full weight.

    Matrices of several experts are tiles, of which the first few are drawn in the place of all.
    A weight whose runs are too many or too thin to be seen has one strip for each rank, as wide
    as all of its runs.
    """
    if not entry.is_sharded:
        return (Strips(None, (box,)),)
    drawn = [_strips(entry, ranks, tile) for tile in _tiles(entry, box)]
    return tuple(
        Strips(rank, tuple(strip for tile in drawn for strip in tile[rank]))
        for rank in range(ranks)
    )


def _tiles(entry: Entry, box: Box) -> list[Box]:
    experts = entry.shape[0] if len(entry.shape) == 3 and entry.dim > 0 else 1
    count = min(experts, _MOST_TILES, int(box.width * box.height / _LEAST_TILE))
    return [box] if count < 2 else [each.inside(_GAP / 4) for each in divided(box, [1] * count)]


def _strips(entry: Entry, ranks: int, box: Box) -> list[list[Box]]:
    """For each rank its runs."""
    size, from_left = entry.view[1], entry.kind in _FROM_LEFT
    runs = [_pairs(entry.runs(rank)) for rank in range(ranks)]
    length = box.width if from_left else box.height
    thinnest = min((n for each in runs for _, n in each), default=size) / size * length
    if sum(map(len, runs)) > _MOST_STRIPS or thinnest < _THINNEST:
        runs = _merged(runs)
        size = sum(n for each in runs for _, n in each)
    return [[box.part(at / size, n / size, from_left=from_left) for at, n in each] for each in runs]


def _pairs(runs: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(runs[::2], runs[1::2], strict=True))


def _merged(runs: Sequence[Sequence[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    """One run for each rank, in rank order."""
    merged, at = [], 0
    for each in runs:
        width = sum(n for _, n in each)
        merged.append([(at, width)])
        at += width
    return merged
