# SPDX-License-Identifier: Apache-2.0
"""Shards are exactly the runs of the full tensor, bit for bit, and write back the same way."""

import math
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepspeed_autotp.native import operators, packing
from tests.support.random_bits import DTYPES, bits, random_bits
from tests.support.random_runs import Slice, reference, slices

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def permuted(full: Tensor, order: Sequence[int]) -> Tensor:
    """The same elements and shape in memory of another order."""
    inverse = [order.index(dim) for dim in range(len(order))]
    return full.permute(list(order)).contiguous().permute(inverse)


def pack(full: Tensor, shard_slice: Slice) -> Tensor:
    return packing.pack(full, view=shard_slice.view, runs=shard_slice.runs, shape=shard_slice.shape)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@settings(deadline=None, max_examples=200)
@given(shard_slice=slices(), dtype=st.sampled_from(DTYPES))
def test_pack_equals_the_concatenated_narrows_bitwise(
    shard_slice: Slice, dtype: torch.dtype
) -> None:
    full = random_bits(shard_slice.full, dtype)
    shard = pack(full, shard_slice)
    assert shard.dtype == dtype
    assert shard.shape == shard_slice.shape
    assert shard.is_contiguous()
    assert torch.equal(bits(shard), reference(full, shard_slice))


@settings(deadline=None, max_examples=200)
@given(shard_slice=slices(disjoint=True), dtype=st.sampled_from(DTYPES))
def test_unpack_restores_the_runs_and_touches_nothing_else(
    shard_slice: Slice, dtype: torch.dtype
) -> None:
    source, target = random_bits(shard_slice.full, dtype), random_bits(shard_slice.full, dtype)
    outer, size, inner = shard_slice.view
    expected = bits(target).reshape(outer, size, inner * dtype.itemsize)
    seen = bits(source).reshape(expected.shape)
    for start, length in zip(shard_slice.runs[::2], shard_slice.runs[1::2], strict=True):
        expected.narrow(1, start, length).copy_(seen.narrow(1, start, length))

    result = target.clone()
    packing.unpack_(result, pack(source, shard_slice), view=shard_slice.view, runs=shard_slice.runs)
    assert torch.equal(bits(result), expected.reshape(*shard_slice.full, dtype.itemsize))
    assert torch.equal(bits(pack(result, shard_slice)), bits(pack(source, shard_slice)))


@settings(deadline=None, max_examples=200)
@given(shard_slice=slices(disjoint=True), data=st.data())
def test_memory_of_another_order_packs_and_unpacks_the_same(
    shard_slice: Slice, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(shard_slice.full))))
    full = random_bits(shard_slice.full, torch.int32)
    shard = pack(permuted(full, order), shard_slice)
    assert torch.equal(shard, pack(full, shard_slice))
    assert shard.is_contiguous()

    target = permuted(torch.zeros_like(full), order)
    packing.unpack_(target, shard, view=shard_slice.view, runs=shard_slice.runs)
    expected = torch.zeros_like(full)
    packing.unpack_(expected, shard, view=shard_slice.view, runs=shard_slice.runs)
    assert torch.equal(target, expected)


@settings(deadline=None, max_examples=200)
@given(shard_slice=slices(), data=st.data())
def test_narrow_is_a_view_that_equals_pack_or_none(shard_slice: Slice, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shard_slice.full))))
    full = permuted(random_bits(shard_slice.full, torch.int32), order)
    view = packing.narrow(
        full, view=shard_slice.view, runs=shard_slice.runs, shape=shard_slice.shape
    )
    if view is None:
        return
    assert len(shard_slice.runs) == 2
    assert torch.equal(view, pack(full, shard_slice))
    assert view.shape == shard_slice.shape
    assert view.untyped_storage().data_ptr() == full.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("full", "view", "runs", "shape"),
    [
        ((6, 4), (1, 6, 4), (3, 3), (3, 4)),
        ((6, 4), (6, 4, 1), (2, 2), (6, 2)),
        ((2, 6, 4), (2, 6, 4), (3, 3), (2, 3, 4)),
        ((8, 4, 3, 3), (8, 4, 9), (2, 2), (8, 2, 3, 3)),
    ],
)
def test_narrow_finds_the_view_of_one_run(
    full: tuple[int, ...], view: packing.View, runs: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    weight = torch.arange(math.prod(full)).view(full)
    shard = packing.narrow(weight, view=view, runs=runs, shape=shape)
    assert shard is not None
    assert torch.equal(shard, packing.pack(weight, view=view, runs=runs, shape=shape))
    shard.fill_(-1)
    assert (weight == -1).sum() == math.prod(shape)


def test_narrow_has_no_view_of_stacked_experts_or_of_two_runs() -> None:
    stacked = torch.zeros(2 * 6, 4)
    assert packing.narrow(stacked, view=(2, 6, 4), runs=(3, 3), shape=(6, 4)) is None
    assert packing.narrow(stacked, view=(1, 12, 4), runs=(0, 2, 6, 2), shape=(4, 4)) is None


def test_stacked_experts_are_sharded_inside_each_expert() -> None:
    experts = torch.arange(2 * 4 * 3).view(8, 3)
    shard = packing.pack(experts, view=(2, 4, 3), runs=(2, 2), shape=(4, 3))
    assert torch.equal(shard, experts[[2, 3, 6, 7]])


def test_pack_never_shares_memory_even_when_the_shard_is_everything() -> None:
    full = torch.zeros(4, 4)
    for weight in (full, full.t()):
        shard = packing.pack(weight, view=(1, 4, 4), runs=(0, 4), shape=(4, 4))
        shard.fill_(1)
        assert not full.any()


@pytest.mark.parametrize(
    ("runs", "shape", "message"),
    [
        ((8, 3), (3, 2), r"run 0 \(start 8, length 3\).*size 10"),
        ((0, 1, -1, 2), (3, 2), r"run 1 \(start -1, length 2\).*size 10"),
        ((0, 2, 11, 1), (3, 2), r"run 1 \(start 11, length 1\).*size 10"),
        ((2**62, 2**62), (3, 2), r"run 0 .*size 10"),
        ((4, 0), (0, 2), r"run 0 \(start 4, length 0\) is empty"),
        ((0, 3, 5), (3, 2), "3 values; expected pairs"),
        ((0, 3), (4, 2), r"select 3 of 10 .*a shard of \(1, 3, 2\).*8 elements"),
    ],
)
@pytest.mark.parametrize("where", ["contiguous", "transposed", "meta"])
def test_bad_runs_raise_value_error_naming_run_and_size(
    where: str, runs: tuple[int, ...], shape: tuple[int, int], message: str
) -> None:
    full = torch.arange(20).view(10, 2)
    given_full = {"contiguous": full, "transposed": permuted(full, (1, 0)), "meta": full.to("meta")}
    weight = given_full[where]
    view = (1, 10, 2)
    with pytest.raises(ValueError, match=message):
        packing.pack(weight, view=view, runs=runs, shape=shape)
    with pytest.raises(ValueError, match=message):
        packing.narrow(weight, view=view, runs=runs, shape=shape)
    with pytest.raises(ValueError, match=message):
        packing.unpack_(weight, weight.new_zeros(shape), view=view, runs=runs)
    assert torch.equal(full, torch.arange(20).view(10, 2))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_view_of_another_size_raises_value_error(transposed: bool) -> None:
    full = torch.zeros(10, 2)
    weight = permuted(full, (1, 0)) if transposed else full
    for view in ((1, 10, 3), (-1, -10, 2), (2**40, 2**40, 2**40)):
        with pytest.raises(ValueError, match="does not fit a full tensor of 20 elements"):
            packing.pack(weight, view=view, runs=(0, 1), shape=(1, 2))


@pytest.mark.parametrize("transposed", [False, True])
def test_overlapping_runs_pack_but_do_not_unpack(transposed: bool) -> None:
    full = torch.arange(20).view(10, 2)
    weight = permuted(full, (1, 0)) if transposed else full
    shard_slice = Slice((10, 2), (1, 10, 2), (5, 2, 0, 1, 6, 1), (4, 2))
    assert torch.equal(pack(weight, shard_slice), full[[5, 6, 0, 6]])
    with pytest.raises(ValueError, match=r"\(start 5, length 2\) and \(start 6, length 1\) overl"):
        packing.unpack_(
            weight,
            torch.zeros(4, 2, dtype=torch.int64),
            view=shard_slice.view,
            runs=shard_slice.runs,
        )


def test_a_shard_of_another_dtype_device_or_of_the_same_memory_is_refused() -> None:
    full = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"float64 on cpu, expected torch\.float32 on cpu as the "):
        packing.unpack_(full, torch.zeros(2, 2).double(), view=(1, 4, 2), runs=(0, 2))
    with pytest.raises(ValueError, match="float32 on meta"):
        packing.unpack_(full, torch.zeros(2, 2, device="meta"), view=(1, 4, 2), runs=(0, 2))
    with pytest.raises(ValueError, match="shares memory with full"):
        packing.unpack_(full, full[1:3], view=(1, 4, 2), runs=(0, 2))
    with pytest.raises(ValueError, match="another dtype than full"):
        operators.loaded().unpack_(full, torch.zeros(2, 2).int(), 1, 4, 2, [0, 2])


def test_a_view_that_joins_dimensions_needs_contiguous_memory() -> None:
    full = torch.arange(24).view(2, 3, 4)
    shard_slice = Slice((2, 3, 4), (1, 6, 4), (1, 3), (3, 4))
    assert torch.equal(pack(full, shard_slice), full.view(6, 4)[1:4])
    with pytest.raises(ValueError, match=r"merges dimensions of a tensor of shape \(2, 3, 4\)"):
        pack(permuted(full, (1, 0, 2)), shard_slice)


def test_meta_tensors_give_meta_shards() -> None:
    full = torch.empty(10, 2, device="meta", dtype=torch.bfloat16)
    shard = packing.pack(full, view=(1, 10, 2), runs=(1, 3), shape=(3, 2))
    assert (shard.device.type, shard.dtype, shard.shape) == ("meta", torch.bfloat16, (3, 2))
    packing.unpack_(full, shard, view=(1, 10, 2), runs=(1, 3))


def test_conjugated_tensors_are_resolved() -> None:
    full = torch.randn(4, 2, dtype=torch.complex64).conj()
    shard = packing.pack(full, view=(1, 4, 2), runs=(1, 2), shape=(2, 2))
    assert torch.equal(shard, full[1:3])
    packing.unpack_(full, shard * 2, view=(1, 4, 2), runs=(1, 2))
    assert torch.equal(full[1:3], shard * 2)


def test_parameters_keep_no_history_and_count_the_write() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 2))
    version = weight._version
    shard = packing.pack(weight, view=(1, 4, 2), runs=(1, 2), shape=(2, 2))
    assert not shard.requires_grad
    packing.unpack_(weight, shard + 1, view=(1, 4, 2), runs=(1, 2))
    assert weight._version > version
    assert weight.sum() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("compile_cache")
def test_opcheck_accepts_both_operators(dtype: torch.dtype) -> None:
    full = torch.randn(4, 6, dtype=dtype)
    args = (full, 4, 6, 1, [4, 2, 0, 1])
    torch.library.opcheck(operators.loaded().pack.default, (*args, [4, 3]))
    shard = torch.randn(4, 3, dtype=dtype)
    torch.library.opcheck(operators.loaded().unpack_.default, (full, shard, *args[1:]))


@pytest.mark.usefixtures("compile_cache")
@pytest.mark.parametrize("transposed", [False, True])
def test_a_compiled_function_gives_the_eager_result(transposed: bool) -> None:
    def double(weight: Tensor) -> Tensor:
        shard = packing.pack(weight, view=(4, 6, 1), runs=(4, 2, 0, 1), shape=(4, 3))
        packing.unpack_(weight, shard * 2, view=(4, 6, 1), runs=(4, 2, 0, 1))
        return shard

    full = torch.randn(4, 6)
    eager, compiled = full.clone(), permuted(full, (1, 0)) if transposed else full.clone()
    run = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(compiled), double(eager))
    assert torch.equal(compiled, eager)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("view", "runs"),
    [
        ((1, 3001, 1021), (1501, 1500)),
        ((3001, 1021, 1), (700, 321, 1, 201)),
        ((1, 3001 * 1021, 1), (1531011, 1531010)),
    ],
)
def test_the_number_of_threads_does_not_change_the_result(
    view: packing.View, runs: tuple[int, ...]
) -> None:
    full = random_bits((3001, 1021), torch.float32)
    shape = (view[0] * sum(runs[1::2]) * view[2],)
    shard_slice = Slice((3001, 1021), view, runs, shape)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        shard = pack(full, shard_slice)
        target = torch.zeros_like(full)
        packing.unpack_(target, shard, view=view, runs=runs)
        results.append((shard, target))
        assert torch.equal(bits(shard), reference(full, shard_slice))
    for shard, target in results[1:]:
        assert torch.equal(bits(shard), bits(results[0][0]))
        assert torch.equal(bits(target), bits(results[0][1]))


def test_more_than_two_to_the_31_elements_are_addressed_exactly() -> None:
    # Of 2 GiB only the pages that are written use memory.
    size = 2**31 + 4096
    full = torch.empty(size, dtype=torch.uint8)
    full[0] = 0
    full[-4:] = torch.tensor([0, 1, 2, 3], dtype=torch.uint8)
    view, runs = (1, size, 1), (size - 3, 3, 0, 1)
    shard = packing.pack(full, view=view, runs=runs, shape=(4,))
    assert shard.tolist() == [1, 2, 3, 0]
    packing.unpack_(full, shard + 1, view=view, runs=runs)
    assert full[-4:].tolist() == [0, 2, 3, 4]
    assert full[0] == 1


PEAK = """
import sys, torch
from deepspeed_autotp.native import packing

def peak():
    # Not ru_maxrss: a child starts with its parent's.
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmHWM"].split()[0]) * 1024

def pack(rows, runs):
    return packing.pack(full, view=(rows, 8192, 1), runs=runs, shape=(rows, sum(runs[1::2])))

torch.set_num_threads(1)
rows = 8192
full = torch.empty(8192, rows).fill_(1)
full = full.t() if sys.argv[1] == "transposed" else full
# The first call loads code; only what a later one takes belongs to the shard.
packing.pack(full[:64], view=(64, 8192, 1), runs=(0, 1), shape=(64, 1))
before = peak()
shard = pack(rows, (64, 1024, 5000, 1024))
print(peak() - before - shard.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_the_peak_extra_memory_of_pack_is_the_shard(layout: str) -> None:
    # A process of its own: the peak of this one may be above what pack needs.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK, layout],
        capture_output=True,
        text=True,
        check=True,
    )
    assert abs(int(done.stdout)) < 4 << 20
