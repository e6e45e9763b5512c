# SPDX-License-Identifier: Apache-2.0
"""Shards of any plan make the full tensor, and those of any other plan."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from deepspeed_autotp._core import Entry, Model, Plan, Rules
from deepspeed_autotp.checkpoint.layout import Layout, resharded
from deepspeed_autotp.checkpoint.shard_tensor import placed
from deepspeed_autotp.native import packing
from deepspeed_autotp.state.sharded_model import shard_of
from tests.support.core_llama import ROOT_MODULE
from tests.support.fuzzing import fuzzed
from tests.support.one_error import check_error
from tests.support.plan_coverage import check_covered
from tests.support.random_bits import DTYPES, bits, random_bits

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]

KINDS = ("linear", "conv1d", "embedding", "other", "experts")
HEAD_KEYS = ("num_attention_heads", "num_key_value_heads", "head_dim")
Given = tuple[Model, list[tuple[list[str], dict[str, Any]]]]


@st.composite
def models(draw: st.DrawFn) -> Given:
    """A model of a few layers of any kind in a module with heads, and a rule for each of them."""
    heads = {key: draw(st.integers(1, 8)) for key in HEAD_KEYS if draw(st.booleans())}
    modules: list[tuple[str, str, str, dict[str, int]]] = [
        (*ROOT_MODULE[:3], {}),
        ("attn", "Attention", "other", heads),
    ]
    parameters: list[tuple[str, str, int, tuple[int, ...], str, int, int]] = []
    rules = []
    for index in range(draw(st.integers(1, 4))):
        name = f"attn.proj_{index}"
        modules.append((name, "Layer", draw(st.sampled_from(KINDS)), {}))
        shape = tuple(draw(st.lists(st.integers(1, 48), min_size=1, max_size=4)))
        here = len(modules) - 1
        parameters.append((f"{name}.weight", "weight", here, shape, "float32", 4, -1))
        if draw(st.booleans()):
            size = (shape[0],)
            parameters.append((f"{name}.bias", "bias", here, size, "float32", 4, -1))
        rules.append(([f"attn.proj_{index}"], draw(specs(shape))))
    return Model(modules, parameters, integers=heads), rules


@st.composite
def specs(draw: st.DrawFn, shape: tuple[int, ...]) -> dict[str, Any]:
    """A specification, which may not fit."""
    kind = draw(st.sampled_from(("column", "row", "skip")))
    spec: dict[str, Any] = {"partition_type": kind}
    dim = draw(st.integers(0, len(shape) - 1))
    how = draw(st.sampled_from(("plain", "plain", "equal", "unequal", "viewed")))
    if kind == "skip" or how == "plain":
        return spec
    seen: list[Any] = list(shape)
    if how == "equal":
        seen = [-1] * len(shape)
        seen[dim] = draw(st.integers(1, 4))
    elif how == "unequal":
        first = draw(st.integers(1, shape[dim]))
        second = draw(st.integers(0, shape[dim] - first))
        pieces = [first, second, shape[dim] - first - second]
        seen[dim] = tuple(piece for piece in pieces if piece)
    else:
        inner = draw(st.sampled_from([n for n in range(1, 49) if shape[dim] % n == 0]))
        seen[dim : dim + 1] = [shape[dim] // inner, inner]
    along = draw(st.sampled_from((dim, dim, dim + 1)))
    return spec | {"shape": tuple(seen), "partition_dim": along}


def made(given_model: Given, ranks: int, grain: int) -> Plan | None:
    """The plan, or None where the rules do not fit."""
    model, listed = given_model
    rules = Rules()
    try:
        for patterns, spec in listed:
            rules.add(patterns, spec, label="rule")
        return Plan(model, rules, ranks=ranks, grain=grain)
    except ValueError as error:
        check_error(error)
        return None


def check_chunks(entry: Entry, shards: list[torch.Tensor], full: torch.Tensor) -> None:
    """What torch.distributed.checkpoint is told of all ranks is each element once."""
    counted = torch.zeros(entry.shape, dtype=torch.int32)
    for rank, shard in enumerate(shards):
        given_tensor = placed(shard, entry, rank)
        for chunk in given_tensor.chunks:
            window = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            local = tuple(slice(o, o + n) for o, n in zip(chunk.local, chunk.sizes, strict=True))
            assert torch.equal(bits(shard[local]), bits(full[window]))
            counted[window] += chunk.is_owned
    assert bool((counted == 1).all())


@fuzzed(60)
@given(models(), st.integers(1, 5), st.sampled_from((1, 1, 4)), st.sampled_from(DTYPES))
def test_shards_are_in_place_and_make_the_full_tensor(
    given_model: Given, ranks: int, grain: int, dtype: torch.dtype
) -> None:
    plan = made(given_model, ranks, grain)
    assume(plan is not None)
    assert plan is not None
    for entry in plan.entries:
        if not entry.is_sharded:
            continue
        check_covered(entry, ranks)
        full = random_bits(entry.shape, dtype)
        shards = [shard_of(full, entry=entry, rank=rank) for rank in range(ranks)]
        again = random_bits(entry.shape, dtype)
        for rank, shard in enumerate(shards):
            assert tuple(shard.shape) == entry.local_shape(rank)
            packing.unpack_(again, shard, view=entry.view, runs=entry.runs(rank))
        assert torch.equal(bits(again), bits(full))
        check_chunks(entry, shards, full)


def shards_at(layout: Layout, name: str, shards: list[torch.Tensor], old: Layout) -> Any:
    """Those of ``layout`` out of those of ``old``."""
    return [
        resharded(
            [lambda shard=shard: shard.reshape(-1) for shard in shards],  # type: ignore[misc]
            old=old.parameters[name],
            new=layout.parameters[name],
            rank=rank,
        )
        for rank in range(layout.ranks)
    ]


@fuzzed(40)
@given(models(), st.lists(st.integers(1, 5), min_size=2, max_size=4), st.sampled_from(DTYPES))
def test_shards_come_back_from_other_sizes(
    given_model: Given, sizes: list[int], dtype: torch.dtype
) -> None:
    plans = [made(given_model, ranks, 1) for ranks in sizes]
    assume(None not in plans)
    layouts = [Layout.of_plan(plan) for plan in plans if plan is not None]
    for name, parameter in layouts[0].parameters.items():
        full = random_bits(parameter.shape, dtype)
        entry = next(e for p in plans[:1] if p is not None for e in p.entries if e.name == name)
        first = [
            shard_of(full, entry=entry, rank=rank) if entry.is_sharded else full
            for rank in range(sizes[0])
        ]
        now, old = first, layouts[0]
        for layout in [*layouts[1:], layouts[0]]:
            now = shards_at(layout, name, now, old)
            assert sum(map(torch.numel, now)) >= math.prod(parameter.shape)
            old = layout
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(now, first, strict=True))
