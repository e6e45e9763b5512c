# SPDX-License-Identifier: Apache-2.0
"""The kernels on a GPU give what the CPU gives, bit for bit where no sum is formed."""

from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.layers.embedding_lookup import lookup
from deepspeed_autotp.native import operators, packing
from deepspeed_autotp.vocab_parallel import cross_entropy, cross_entropy_kernels
from tests.support.column_shards import layout_of
from tests.support.cross_entropy_kernels import ROUNDING, batch, exact
from tests.support.packing_examples import SLICES
from tests.support.random_bits import random_bits

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.float64, torch.complex128]


def drawn(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
    return random_bits(shape, dtype, offset=offset, device="cuda")


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.cpu().view(-1).view(torch.uint8), b.cpu().view(-1).view(torch.uint8))


@pytest.fixture(autouse=True)
def kernels_are_there() -> None:
    assert operators.unavailable_reason(torch.cuda.current_device()) == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_shards_are_those_of_the_cpu(dtype: torch.dtype, offset: int) -> None:
    for shape, view, runs, part in SLICES:
        full = drawn(shape, dtype, offset)
        expected = packing.pack(full.cpu(), view=view, runs=runs, shape=part)
        shard = packing.pack(full, view=view, runs=runs, shape=part)
        assert shard.is_cuda and same(shard, expected)
        (again,) = packing.pack_many([full], [packing.ShardSlice(view=view, runs=runs, shape=part)])
        assert same(again, expected)
        written, on_cpu = full.clone(), full.cpu().clone()
        other = drawn(part, dtype, offset)
        packing.unpack_(written, other, view=view, runs=runs)
        packing.unpack_(on_cpu, other.cpu(), view=view, runs=runs)
        assert same(written, on_cpu)
        assert same(packing.compact_(full, view=view, runs=runs, shape=part), expected)


@pytest.mark.parametrize(
    ("view", "runs"),
    [
        ((4096, 6144, 1), (0, 1536)),
        ((4096, 6144, 1), (0, 5000)),
        ((1, 6144, 4096), (0, 512, 2048, 512, 4096, 512)),
        ((5000, 4001, 1), (1, 4000)),
    ],
)
def test_a_large_weight_is_packed_in_its_own_memory(
    view: tuple[int, int, int], runs: tuple[int, ...]
) -> None:
    shape = (view[0], sum(runs[1::2]), view[2])
    full = drawn(view, torch.bfloat16, 0)
    expected = packing.pack(full.cpu(), view=view, runs=runs, shape=shape)
    shard = packing.compact_(full, view=view, runs=runs, shape=shape)
    assert shard.data_ptr() == full.data_ptr() and same(shard, expected)


def test_thousands_of_tensors_are_packed_together() -> None:
    shard_slice = packing.ShardSlice(view=(1, 64, 48), runs=(16, 16), shape=(16, 48))
    fulls = [drawn((64, 48), torch.bfloat16, index % 3) for index in range(1500)]
    for full, shard in zip(fulls, packing.pack_many(fulls, [shard_slice] * 1500), strict=True):
        assert torch.equal(full[16:32].view(torch.int16), shard.view(torch.int16))


def test_elements_beyond_32_bits_are_reached() -> None:
    rows = 2**31 // 4096 + 3
    if torch.cuda.mem_get_info()[0] < 3 * rows * 4096:
        pytest.skip("less than 7 GiB of GPU memory is free")
    full = torch.zeros(rows, 4096, dtype=torch.uint8, device="cuda")
    full[-1, 1024:2048] = torch.arange(1024, device="cuda").to(torch.uint8)
    shard = packing.pack(full, view=(rows, 4096, 1), runs=(1024, 1024), shape=(rows, 1024))
    assert torch.equal(shard[-1], full[-1, 1024:2048]) and not shard[:-1].any()


def test_logits_beyond_32_bits_are_reached() -> None:
    tokens, width = (1 << 16) + 2, 1 << 15
    if torch.cuda.mem_get_info()[0] < 3 * tokens * width:
        pytest.skip("less than 7 GiB of GPU memory is free")
    logits = torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda")
    logits[-1, 7] = 9
    columns = torch.full((tokens,), 7, device="cuda")
    found = cross_entropy_kernels.statistics(logits, columns)
    assert found[:, 0].tolist() == [0, width, 0] and found[0, -1] == found[2, -1] == 9
    scale = torch.zeros(tokens, device="cuda")
    scale[-1] = 1
    cross_entropy_kernels.differentiate_(logits, found[0] + found[1].log(), columns, scale)
    expected = torch.zeros(width)
    expected[7] = 9
    expected = expected.softmax(0)
    expected[7] -= 1
    assert torch.allclose(logits[-1].float().cpu(), expected, rtol=1e-2)
    assert not logits[:-1].any()


@pytest.mark.parametrize("of_ids", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_a_lookup_and_its_gradient_are_those_of_the_cpu(
    dtype: torch.dtype, of_ids: torch.dtype
) -> None:
    size, held = 1000, 250
    # Few tokens and many have other kernels of torch's for the gradient. In the last case all rows
    # of the weight are there, and others: one kind of index more than there are rows.
    cases = (
        (0, 8, 0, 503),
        (5, 1, 3, 503),
        (300, 33, 1, 503),
        (5000, 8, 0, 503),
        (5000, 4096, 0, 2),
    )
    for tokens, features, offset, padding in cases:
        ids = (torch.arange(tokens) * 7 % size).to(of_ids)
        on_cpu = drawn((held, features), dtype, 0).cpu()
        weight = torch.empty(held * features + offset, dtype=dtype, device="cuda")[offset:]
        weight = weight.view(held, features).copy_(on_cpu)
        found = lookup(weight, ids.cuda(), start=500, size=size, padding=padding)
        assert same(found, lookup(on_cpu, ids, start=500, size=size, padding=padding))
        if not dtype.is_floating_point:
            continue
        # Sums of small integers are exact in any order.
        dy = torch.randint(-2, 3, (tokens, features)).to(dtype)
        for rows, where in ((on_cpu, "cpu"), (weight, "cuda")):
            looked = lookup(
                rows.requires_grad_(), ids.to(where), start=500, size=size, padding=padding
            )
            looked.backward(dy.to(where))
        assert on_cpu.grad is not None and weight.grad is not None
        assert torch.equal(weight.grad.cpu(), on_cpu.grad)


def test_an_id_outside_the_vocabulary_gives_nan_and_leaves_the_device_usable() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        weight = torch.ones(4, 24, dtype=dtype, device="cuda", requires_grad=True)
        ids = torch.tensor([-1, 2, 9, 10, 2**40], device="cuda")
        found = lookup(weight, ids, start=0, size=10)
        assert found.isnan().all(1).tolist() == [True, False, False, True, True]
        found[1:3].sum().backward()
        assert weight.grad is not None and weight.grad[2].eq(1).all() and weight.grad.sum() == 24
    torch.cuda.synchronize()


def test_a_lookup_beyond_32_bits_is_reached() -> None:
    rows = 2**31 // 4096 + 3
    if torch.cuda.mem_get_info()[0] < 3 * rows * 4096:
        pytest.skip("less than 7 GiB of GPU memory is free")
    weight = torch.zeros(rows, 4096, dtype=torch.uint8, device="cuda")
    weight[-1] = 7
    ids = torch.full((rows,), rows, device="cuda")
    ids[-1] = rows - 1
    found = lookup(weight, ids, start=0, size=rows + 1)
    assert found[-1].eq(7).all() and not found[:-1].any()


def test_copies_follow_the_current_stream() -> None:
    side = torch.cuda.Stream()
    full = torch.zeros(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        full.fill_(7)
        shard = packing.pack(full, view=(1, 4096, 4096), runs=(0, 1024), shape=(1024, 4096))
    side.synchronize()
    assert bool((shard == 7).all())


def test_what_does_not_fit_is_an_error_and_leaves_the_device_usable() -> None:
    full = torch.arange(12.0, device="cuda").view(3, 4)
    view = (3, 4, 1)
    with pytest.raises(
        ValueError, match=r"float32 on cpu, expected torch\.float32 on cuda:0 as the "
    ):
        packing.unpack_(full, torch.zeros(3, 2), view=view, runs=(0, 2))
    with pytest.raises(ValueError, match="is outside the sharded dimension"):
        packing.pack(full, view=view, runs=(3, 2), shape=(3, 2))
    named = operators.loaded()
    with pytest.raises(ValueError, match="columns: expected int64"):
        named.vocab_statistics(full, torch.zeros(3, device="cuda"), 0.0)
    with pytest.raises(ValueError, match="different devices"):
        named.vocab_statistics(full, torch.zeros(3, dtype=torch.int64), 0.0)
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        columns = torch.zeros(3, dtype=torch.int64, device="cuda")
        named.vocab_statistics(full.double(), columns, 0.0)
    assert packing.pack(full, view=view, runs=(1, 1), shape=(3, 1)).tolist() == [[1], [5], [9]]
    torch.cuda.synchronize()


@pytest.mark.parametrize("cap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_row_of_logits_gives_what_float64_gives(dtype: torch.dtype, cap: float) -> None:
    for width, offset in ((1, 0), (7, 1), (513, 3), (4099, 0), (32064, 0), (50257, 1)):
        on_cpu, columns = batch(width, dtype)
        total, label, gradient = exact(on_cpu, columns, cap)
        logits = torch.empty(6 * width + offset, dtype=dtype, device="cuda")[offset:]
        logits = logits.view(6, width).copy_(on_cpu)
        found = cross_entropy_kernels.statistics(logits, columns.cuda(), cap=cap)
        assert torch.equal(found, cross_entropy_kernels.statistics(logits, columns.cuda(), cap=cap))
        found = found.cpu().double()
        rows = total.isfinite()
        sums = found[0] + found[1].log()
        assert (sums - total)[rows].abs().max() <= 1e-6 * total[rows].abs().max()
        assert found[1][~rows].eq(0).all()
        assert (found[2] - label)[rows].abs().max() <= 1e-6 * label[rows].abs().max().clamp(min=1)
        scale = torch.where(rows, 0.5, 0.0).cuda()
        total = total.float().cuda()
        cross_entropy_kernels.differentiate_(logits, total, columns.cuda(), scale, cap=cap)
        error = (logits.cpu().double() - 0.5 * gradient)[rows].abs().max()
        assert error <= ROUNDING[dtype] * gradient[rows].abs().max().clamp(min=1e-3)
        assert logits[~rows.cuda()].eq(0).all()


def test_shards_of_a_vocabulary_give_the_loss_of_the_full_one() -> None:
    tokens, size = 300, 50257
    full = (torch.randn(tokens, size, device="cuda") * 4).to(torch.bfloat16)
    labels = torch.randint(0, size, (tokens,), device="cuda")
    exact_loss = torch.nn.functional.cross_entropy(full.double(), labels, reduction="none")
    starts, widths = (0, 25129), (25129, 25128)
    parts = [full[:, s : s + w].contiguous() for s, w in zip(starts, widths, strict=True)]
    found = [
        cross_entropy_kernels.statistics(part, labels - start)
        for part, start in zip(parts, starts, strict=True)
    ]
    logsumexp, target = cross_entropy._combined(found)
    assert (logsumexp - target - exact_loss).abs().max() <= 1e-6 * exact_loss.max()


def test_transposed_tensors_and_those_without_items_are_as_on_the_cpu() -> None:
    full, columns = drawn((96, 64), torch.bfloat16, 0).t(), torch.zeros(64, dtype=torch.int64)
    view, runs, part = (64, 96, 1), (24, 24), (64, 24)
    expected = packing.pack(full.cpu(), view=view, runs=runs, shape=part)
    shard = packing.pack(full, view=view, runs=runs, shape=part)
    assert same(shard, expected)
    written, on_cpu = torch.zeros_like(full), torch.zeros_like(full.cpu())
    packing.unpack_(written, shard, view=view, runs=runs)
    packing.unpack_(on_cpu, expected, view=view, runs=runs)
    assert torch.equal(written.cpu(), on_cpu)
    for logits in (full.float(), full[:, :0], full[:0]):
        found = cross_entropy_kernels.statistics(logits, columns[: len(logits)].cuda())
        on_cpu = cross_entropy_kernels.statistics(logits.cpu(), columns[: len(logits)])
        assert torch.allclose(found.cpu(), on_cpu)
    torch.cuda.synchronize()


def test_labels_outside_of_the_vocabulary_leave_the_device_usable() -> None:
    """Looking would wait for the device, so their losses and gradients are no numbers."""
    logits = torch.randn(5, 1000, dtype=torch.bfloat16, device="cuda")
    labels = torch.tensor([3, 1000, -7, -100, 2**40], device="cuda")
    full = logits.float().requires_grad_()
    part = logits.clone().requires_grad_()
    losses = cross_entropy.vocabulary_cross_entropy(
        part * 1, labels, layout=layout_of([1000]), group=cast(TPGroup, _Alone())
    )
    losses.sum().backward()
    known = F.cross_entropy(full[:1], labels[:1])
    known.backward()
    assert torch.allclose(losses[0], known) and losses[3] == 0
    assert losses.isnan().tolist() == [False, True, True, False, True]
    assert part.grad is not None and full.grad is not None
    assert torch.allclose(part.grad[0].float(), full.grad[0], atol=4e-3)
    assert part.grad.isnan().all(1).tolist() == [False, True, True, False, True]
    assert not part.grad[3].any()
    torch.cuda.synchronize()


class _Alone:
    """A group of one rank."""

    rank, size = 0, 1

    def all_gather(self, x: Tensor, shapes: object) -> list[Tensor]:
        return [x]


def test_the_two_passes_take_less_than_two_percent_of_the_logits() -> None:
    logits = torch.randn(4096, 32064, dtype=torch.bfloat16, device="cuda")
    columns = torch.randint(0, 32064, (4096,), device="cuda")
    scale = torch.ones(4096, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = cross_entropy_kernels.statistics(logits, columns)
    logsumexp = found[1].log() + found[0]
    cross_entropy_kernels.differentiate_(logits, logsumexp, columns, scale)
    assert torch.cuda.max_memory_allocated() - before < 0.02 * logits.nbytes
