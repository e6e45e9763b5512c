# SPDX-License-Identifier: Apache-2.0
"""What goes through small buffers piece by piece is the shard."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_autotp.native import operators, packing
from deepspeed_autotp.sharding.pinned_copy import PinnedCopy
from tests.support.random_bits import DTYPES, bits, random_bits
from tests.support.random_runs import Slice, reference, slices

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
HOST = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(slices(), st.sampled_from(DTYPES), st.integers(1, 40), st.booleans())
def test_a_shard_through_buffers_is_the_shard(
    shard_slice: Slice, dtype: torch.dtype, buffer: int, transposed: bool
) -> None:
    full = random_bits(shard_slice.full, dtype)
    given_full = full.transpose(0, -1).contiguous().transpose(0, -1) if transposed else full
    pinned = PinnedCopy(HOST, buffer=buffer)
    for _ in range(2):
        wanted = packing.ShardSlice(
            view=shard_slice.view, runs=shard_slice.runs, shape=shard_slice.shape
        )
        shard = pinned.shard(given_full, wanted)
        assert shard.dtype == dtype and shard.shape == shard_slice.shape
        assert torch.equal(bits(shard), reference(full, shard_slice))
    assert torch.equal(bits(pinned.full(given_full)), bits(full))


def test_the_device_holds_only_the_shard_and_no_view_of_a_buffer() -> None:
    pinned = PinnedCopy(HOST, buffer=16)
    full = torch.arange(12.0).view(3, 4)
    shard_slice = packing.ShardSlice(view=(3, 4, 1), runs=(2, 2), shape=(3, 2))
    first = pinned.shard(full, shard_slice)
    pinned.shard(full + 1, shard_slice)
    assert first.tolist() == [[2, 3], [6, 7], [10, 11]]
    assert first.untyped_storage().nbytes() == first.nbytes


def test_a_piece_behind_the_shard_is_refused() -> None:
    full = torch.arange(6.0)
    shard_slice = packing.ShardSlice(view=(1, 6, 1), runs=(1, 2), shape=(2,))
    part = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected bytes of the shard, got some after its end"):
        packing.pack_part_(part, full, shard_slice, begin=1)
    with pytest.raises(ValueError, match="expected bytes of the shard, got some after its end"):
        packing.pack_part_(part, full, shard_slice, begin=-1)
    with pytest.raises(ValueError, match="contiguous tensor of bytes on the CPU"):
        packing.pack_part_(part.float(), full, shard_slice, begin=0)
    assert not part.any()


@pytest.mark.usefixtures("compile_cache")
def test_opcheck_accepts_the_operator() -> None:
    named = operators.loaded().pack_part_.default
    arguments = (torch.zeros(6, dtype=torch.uint8), torch.randn(4, 6), 4, 6, 1, [4, 2], [4, 2], 3)
    torch.library.opcheck(named, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("buffer", [1 << 12, 1 << 16])
def test_a_shard_arrives_on_a_gpu(buffer: int) -> None:
    pinned = PinnedCopy(torch.device("cuda", torch.cuda.current_device()), buffer=buffer)
    full = torch.randn(600, 1000).bfloat16()
    for view, runs, shape in (
        ((600, 1000, 1), (250, 250), (600, 250)),
        ((1, 600, 1000), (0, 100, 300, 100), (200, 1000)),
    ):
        # Pieces wait behind this, so a buffer that is filled again before it has left is seen.
        torch.cuda._sleep(20_000_000)
        shard = pinned.shard(full, packing.ShardSlice(view=view, runs=runs, shape=shape))
        assert shard.is_cuda
        assert torch.equal(shard.cpu(), packing.pack(full, view=view, runs=runs, shape=shape))
    torch.cuda._sleep(20_000_000)
    assert torch.equal(pinned.full(full).cpu(), full)
