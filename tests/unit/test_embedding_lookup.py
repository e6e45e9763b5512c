# SPDX-License-Identifier: Apache-2.0
"""A lookup of own rows is torch's embedding with the rows of other ranks masked, and so is its
gradient, bit for bit."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed_autotp.layers import embedding_lookup as module
from deepspeed_autotp.layers.embedding_lookup import lookup
from deepspeed_autotp.native import operators
from tests.support.peak_memory import PeakMemory

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SIZE = 50
Looked = Callable[[Tensor, Tensor, int, int, int], Tensor]


def operator(weight: Tensor, ids: Tensor, start: int, size: int, padding: int) -> Tensor:
    return lookup(weight, ids, start=start, size=size, padding=padding)


def by_torch(weight: Tensor, ids: Tensor, start: int, size: int, padding: int) -> Tensor:
    """What a device without the operator does."""
    found: Tensor = module._TorchLookup.apply(weight, ids, start, size, padding)  # type: ignore[no-untyped-call]
    return found


@pytest.fixture(params=[operator, by_torch])
def looked(request: pytest.FixtureRequest) -> Looked:
    way: Looked = request.param
    return way


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def masked(weight: Tensor, ids: Tensor, start: int, padding: int) -> Tensor:
    """The reference: torch looks every token up, and zeros replace what is not this rank's."""
    elsewhere = (ids < start) | (ids >= start + len(weight))
    local = (ids - start).masked_fill(elsewhere, 0)
    own = padding - start if 0 <= padding - start < len(weight) else None
    return F.embedding(local, weight, own).masked_fill(elsewhere.unsqueeze(-1), 0)


def rows_of(dtype: torch.dtype, *, rows: int = 11, features: int = 24) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(rows, features, generator=draw).to(dtype).requires_grad_()


def every_id(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return (torch.arange(torch.Size(shape).numel()) * 7 % SIZE).view(shape).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_ids", [torch.int64, torch.int32])
@pytest.mark.parametrize(("start", "padding"), [(0, -1), (30, 33), (39, 3), (39, 49)])
def test_values_and_gradients_are_those_of_a_masked_embedding(
    looked: Looked, dtype: torch.dtype, of_ids: torch.dtype, start: int, padding: int
) -> None:
    # More tokens than rows: all rows and all other ids are there, some of them many times.
    ids = every_id(3, 70, dtype=of_ids)
    weight, other = rows_of(dtype), rows_of(dtype)
    found, expected = looked(weight, ids, start, SIZE, padding), masked(other, ids, start, padding)
    assert same_bits(found, expected)
    dy = torch.randn(expected.shape).to(dtype)
    found.backward(dy)
    expected.backward(dy)
    assert weight.grad is not None and other.grad is not None
    assert same_bits(weight.grad, other.grad)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (2, 3, 4)])
@pytest.mark.parametrize(("rows", "features"), [(11, 24), (0, 24), (11, 0), (1, 1)])
def test_any_size_is_looked_up(
    looked: Looked, shape: tuple[int, ...], rows: int, features: int
) -> None:
    weight = rows_of(torch.float32, rows=rows, features=features)
    ids = every_id(*shape)
    found = looked(weight, ids, 0, SIZE, -1)
    assert found.shape == (*shape, features) and found.is_contiguous()
    held = torch.cat([weight.detach(), torch.zeros(SIZE - rows, features)])
    assert torch.equal(found, held[ids])
    found.sum().backward()
    assert weight.grad is not None and weight.grad.shape == weight.shape
    assert weight.grad.sum() == features * (ids < rows).sum()


def test_strided_weights_and_ids_give_the_same() -> None:
    weight = torch.randn(24, 11, dtype=torch.float64).t().requires_grad_()
    ids = every_id(6, 4).t()
    found = lookup(weight, ids, start=30, size=SIZE)
    assert torch.equal(found, masked(weight, ids, 30, -1))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        check(lambda w: lookup(w, ids, start=30, size=SIZE), (weight,))


def test_rows_of_another_rank_do_not_reach_the_result_whatever_they_hold(looked: Looked) -> None:
    weight = torch.full((4, 3), torch.nan).requires_grad_()
    ids = torch.tensor([0, 9])
    found = looked(weight, ids, 2, SIZE, -1)
    assert found.eq(0).all()
    found.backward(torch.full_like(found, torch.inf))
    assert weight.grad is not None and weight.grad.eq(0).all()


@pytest.mark.parametrize("strange", [-1, SIZE, -100, 2**40])
def test_an_id_outside_the_vocabulary_is_named_on_a_cpu(strange: int) -> None:
    ids = torch.tensor([3, strange, 4])
    for start in (0, 30):
        with pytest.raises(
            IndexError, match=rf"^ids: got {strange}, expected 0 to 49, the rows of"
        ):
            lookup(rows_of(torch.float32), ids, start=start, size=SIZE)


def test_an_id_outside_the_vocabulary_gives_nan_where_looking_would_wait() -> None:
    weight = rows_of(torch.float32)
    ids = torch.tensor([3, -1, 20, SIZE])
    found = by_torch(weight, ids, 0, SIZE, -1)
    assert found.isnan().any(1).tolist() == [False, True, False, True]
    assert torch.equal(found[0], weight[3]) and found[2].eq(0).all()
    found.backward(torch.ones_like(found))
    assert weight.grad is not None and weight.grad.sum() == 24


def test_what_does_not_fit_is_refused() -> None:
    weight, ids = rows_of(torch.float32), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="ids: expected int64 or int32"):
        lookup(weight, ids.to(torch.int16), start=0, size=SIZE)
    with pytest.raises(ValueError, match=r"\[rows, features\]"):
        lookup(weight[0], ids, start=0, size=SIZE)
    for start in (-1, 40, SIZE + 1):
        with pytest.raises(ValueError, match="inside of the vocabulary"):
            lookup(weight, ids, start=start, size=SIZE)
    with pytest.raises(ValueError, match="ids are not contiguous"):
        operators.loaded().lookup(weight, torch.arange(4)[::2], 0, SIZE, -1)


@pytest.mark.usefixtures("compile_cache")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_accepts_the_operator(dtype: torch.dtype) -> None:
    named = operators.loaded().lookup.default
    for padding in (-1, 33):
        torch.library.opcheck(named, (rows_of(dtype), every_id(2, 5), 30, SIZE, padding))
    torch.library.opcheck(named, (rows_of(dtype).detach(), every_id(5).int(), 0, SIZE, -1))


@pytest.mark.usefixtures("compile_cache")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # by torch's compiler
def test_a_compiled_lookup_gives_the_eager_result(looked: Looked) -> None:
    weight, other = rows_of(torch.float32), rows_of(torch.float32)
    ids = every_id(3, 70)
    run = torch.compile(looked, fullgraph=True, backend="aot_eager")
    found = run(weight, ids, 30, SIZE, 33)
    expected = masked(other, ids, 30, 33)
    assert torch.equal(found, expected)
    for y in (found, expected):
        y.square().sum().backward()
    assert weight.grad is not None and other.grad is not None
    assert torch.equal(weight.grad, other.grad)


def test_a_step_takes_memory_for_the_result_and_the_gradient_alone() -> None:
    weight = torch.randn(64, 256).requires_grad_()
    ids = torch.arange(2048) % SIZE
    dy = torch.randn(2048, 256)
    with PeakMemory() as forward:
        found = lookup(weight, ids, start=0, size=64)
    assert forward.most == found.nbytes
    with PeakMemory() as backward:
        found.backward(dy)
    assert weight.grad is not None
    # The row for what is skipped, and some numbers for each token.
    assert backward.most <= weight.nbytes + 1024 + 5 * ids.nbytes


def test_the_gradient_is_kept_where_it_was_made() -> None:
    weight = rows_of(torch.float32)
    made: list[int] = []
    weight.register_hook(lambda gradient: made.append(gradient.data_ptr()))
    lookup(weight, every_id(70), start=0, size=SIZE).sum().backward()
    assert weight.grad is not None and [weight.grad.data_ptr()] == made


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_does_not_change_the_result() -> None:
    weight = rows_of(torch.float32, features=4096)
    ids = every_id(1024)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(lookup(weight, ids, start=30, size=SIZE))
    assert torch.equal(results[0], masked(weight, ids, 30, -1))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_more_than_two_to_the_31_elements_are_addressed_exactly() -> None:
    # Of 2 GiB only the pages that are written use memory.
    rows = 2**31 // 4096 + 3
    weight = torch.empty(rows, 4096, dtype=torch.uint8)
    weight[-1], weight[0] = 7, 1
    found = lookup(weight, torch.tensor([rows + 2, 3, 0]), start=3, size=rows + 3)
    assert found[:, 0].tolist() == [7, 1, 0] and found[0].eq(7).all()
