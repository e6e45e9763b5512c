# SPDX-License-Identifier: Apache-2.0
"""Random shapes and runs to pack, and the shard that torch alone makes of them."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support.random_bits import bits


@dataclass(frozen=True, slots=True)
class Slice:
    """A full shape, how it is seen around the sharded dimension, and the shape of a shard."""

    full: tuple[int, ...]
    view: tuple[int, int, int]
    runs: tuple[int, ...]
    shape: tuple[int, ...]


def disjoint_runs(draw: st.DrawFn, size: int) -> list[int]:
    marks = sorted(draw(st.sets(st.integers(0, size), max_size=8)))
    spans = list(pairwise(marks))
    kept = draw(st.permutations(spans))[: draw(st.integers(0, len(spans)))]
    return [number for start, stop in kept for number in (start, stop - start)]


def any_runs(draw: st.DrawFn, size: int) -> list[int]:
    runs = []
    for _ in range(draw(st.integers(0, 6)) if size else 0):
        start = draw(st.integers(0, size - 1))
        runs += [start, draw(st.integers(1, size - start))]
    return runs


@st.composite
def slices(draw: st.DrawFn, *, disjoint: bool = False) -> Slice:
    """Any rank from 1 to 5, sizes from 0; sometimes the sharded dimension is stacked in another."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    dim = draw(st.integers(0, len(sizes) - 1))
    stacked = draw(st.sampled_from((1, 1, 2, 3)))
    size = sizes[dim]
    runs = disjoint_runs(draw, size) if disjoint else any_runs(draw, size)
    view = (math.prod(sizes[:dim]) * stacked, size, math.prod(sizes[dim + 1 :]))
    full = (*sizes[:dim], stacked * size, *sizes[dim + 1 :])
    shape = (*sizes[:dim], stacked * sum(runs[1::2]), *sizes[dim + 1 :])
    return Slice(full, view, tuple(runs), shape)


def reference(full: Tensor, shard_slice: Slice) -> Tensor:
    """The bytes of the shard, from torch alone."""
    outer, size, inner = shard_slice.view
    seen = bits(full).reshape(outer, size, inner * full.element_size())
    parts = [
        seen.narrow(1, *run)
        for run in zip(shard_slice.runs[::2], shard_slice.runs[1::2], strict=True)
    ]
    empty = seen.narrow(1, 0, 0)
    return torch.cat([empty, *parts], 1).reshape(*shard_slice.shape, full.element_size())
