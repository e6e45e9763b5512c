# SPDX-License-Identifier: Apache-2.0
"""Shards of many tensors at once, and shards in the memory of the full tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_autotp.native import operators, packing
from tests.support.random_bits import DTYPES, bits, random_bits
from tests.support.random_runs import Slice, reference, slices

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def of(shard_slice: Slice) -> packing.ShardSlice:
    return packing.ShardSlice(view=shard_slice.view, runs=shard_slice.runs, shape=shard_slice.shape)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(slices(), st.sampled_from(DTYPES)), max_size=5))
def test_many_shards_are_those_of_each(drawn: list[tuple[Slice, torch.dtype]]) -> None:
    fulls = [random_bits(shard_slice.full, dtype) for shard_slice, dtype in drawn]
    shards = packing.pack_many(fulls, [of(shard_slice) for shard_slice, _ in drawn])
    assert len(shards) == len(drawn)
    for shard, full, (shard_slice, dtype) in zip(shards, fulls, drawn, strict=True):
        assert shard.dtype == dtype and shard.shape == shard_slice.shape
        assert torch.equal(bits(shard), reference(full, shard_slice))


def test_many_shards_of_tensors_in_any_layout() -> None:
    full = torch.randn(6, 4)
    shard_slice = packing.ShardSlice(view=(6, 4, 1), runs=(1, 2), shape=(6, 2))
    shards = packing.pack_many([full, full.t().contiguous().t()], [shard_slice, shard_slice])
    assert all(torch.equal(shard, full[:, 1:3]) for shard in shards)


@settings(max_examples=100, deadline=None)
@given(slices(disjoint=True), st.sampled_from(DTYPES))
def test_a_shard_in_place_is_the_shard(shard_slice: Slice, dtype: torch.dtype) -> None:
    runs = tuple(
        n
        for run in sorted(zip(shard_slice.runs[::2], shard_slice.runs[1::2], strict=True))
        for n in run
    )
    ordered = Slice(shard_slice.full, shard_slice.view, runs, shard_slice.shape)
    full = random_bits(shard_slice.full, dtype)
    expected = reference(full, ordered)
    version = full._version
    shard = packing.compact_(full, view=shard_slice.view, runs=runs, shape=shard_slice.shape)
    assert torch.equal(bits(shard), expected)
    assert shard.data_ptr() in (full.data_ptr(), 0) and full._version > version


def test_runs_that_do_not_ascend_cannot_be_packed_in_place() -> None:
    full = torch.arange(6.0)
    with pytest.raises(ValueError, match="run 1 .start 0, length 2. starts before the end"):
        packing.compact_(full, view=(1, 6, 1), runs=(3, 2, 0, 2), shape=(4,))
    by_torch = torch.zeros(6, dtype=torch.complex64).conj()
    with pytest.raises(ValueError, match="run 1 .start 0, length 2. starts before the end"):
        packing.compact_(by_torch, view=(1, 6, 1), runs=(3, 2, 0, 2), shape=(4,))
    with pytest.raises(ValueError, match="packing in place needs a contiguous tensor"):
        packing.compact_(torch.zeros(4, 4).t(), view=(4, 4, 1), runs=(0, 2), shape=(4, 2))
    assert full.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_table_that_does_not_fit_is_refused() -> None:
    named = operators.loaded()
    full = torch.arange(6.0)
    for table, words in (
        ([1, 6, 1, 2], "entries for fewer tensors"),
        ([1, 6, 1, 2, 1, 0, 3, -1], "negative size"),
        ([1, 6, 1, -2, 1, 0, 3, 3], "entries for fewer tensors"),
        ([1, 6, 1, 2, 1, 0, 3, 3, 1], "entries for more tensors"),
    ):
        with pytest.raises(ValueError, match=words):
            named.pack_many([full], table)


@pytest.mark.usefixtures("compile_cache")
def test_opcheck_accepts_the_operators() -> None:
    named = operators.loaded()
    full = torch.randn(4, 6)
    table = [4, 6, 1, 4, 2, 0, 1, 3, 2, 4, 3]
    torch.library.opcheck(named.pack_many.default, ([full], table))
    arguments = (full, 4, 6, 1, [0, 1, 3, 2], [4, 3])
    torch.library.opcheck(named.compact_.default, arguments)
