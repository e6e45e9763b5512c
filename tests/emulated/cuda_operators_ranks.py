# SPDX-License-Identifier: Apache-2.0
"""The operators for a GPU on CPU tensors, for test_cuda_operators.py, in processes of their own.

torch's dispatcher is told to use the implementation for CUDA.
"""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from deepspeed_autotp.native import operators, packing
from deepspeed_autotp.vocab_parallel import cross_entropy_kernels
from tests.support.cross_entropy_kernels import batch, exact
from tests.support.emulated_cuda import ORDERS, Library
from tests.support.packing_examples import SLICES
from tests.support.raised_error import raised_error
from tests.support.random_bits import random_bits

Slice = tuple[tuple[int, ...], tuple[int, int, int], tuple[int, ...], tuple[int, ...]]
PLACES = (
    (torch.bfloat16, 0),
    (torch.float32, 1),
    (torch.uint8, 3),
    (torch.float64, 1),
    (torch.complex128, 3),
    (torch.bfloat16, 3),
)

_OPS = operators.loaded()
_OVERLOADS = {
    "pack": _OPS.pack.default,
    "pack_many": _OPS.pack_many.default,
    "unpack_": _OPS.unpack_.default,
    "compact_": _OPS.compact_.default,
    "vocab_statistics": _OPS.vocab_statistics.default,
    "vocab_gradient_": _OPS.vocab_gradient_.default,
    "lookup": _OPS.lookup.default,
}
_LIBRARY = Library(Path(os.environ["AUTOTP_CUDA_LIBRARY"]))
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def on_gpu(name: str, *args: object) -> object:
    return _OVERLOADS[name].redispatch(_CUDA, *args)


def failure(function: Callable[..., object], *args: object) -> str:
    return raised_error(lambda: function(*args))


def same(a: object, b: Tensor) -> bool:
    assert isinstance(a, Tensor)
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def drawn_slices(count: int) -> Iterator[Slice]:
    """Shards of one row or of many, shorter and longer than a tile, with one run or several."""
    draw = random.Random(count)
    for _ in range(count):
        size = draw.randint(2, 40)
        outer, inner = draw.choice(((1, 3), (1, 999), (7, 250), (300, 1), (40, 33), (3, 2500)))
        edges = sorted(draw.sample(range(size + 1), 2 * draw.randint(1, min(3, size // 2))))
        pairs = [(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        width = sum(length for _, length in pairs)
        runs = tuple(value for pair in pairs for value in pair)
        yield (outer, size, inner), (outer, size, inner), runs, (outer, width, inner)


def check_slice(shard_slice: Slice, dtype: torch.dtype, full_off: int, shard_off: int) -> None:
    shape, view, runs, part = shard_slice
    full = random_bits(shape, dtype, offset=full_off)
    want = packing.pack(full, view=view, runs=runs, shape=part)
    assert same(on_gpu("pack", full, *view, runs, part), want)
    table = [*view, len(runs), len(part), *runs, *part]
    several = on_gpu("pack_many", [full, full], table * 2)
    assert isinstance(several, list) and len(several) == 2
    assert same(several[0], want) and same(several[1], want)
    ours, theirs, shard = full.clone(), full.clone(), random_bits(part, dtype, offset=shard_off)
    on_gpu("unpack_", ours, shard, *view, runs)
    packing.unpack_(theirs, shard, view=view, runs=runs)
    assert same(ours, theirs)
    on_gpu("compact_", full, *view, runs, part)
    assert same(full.view(-1)[: want.numel()].view(want.shape), want)


def copies() -> None:
    for order, (dtype, offset) in enumerate(PLACES):
        _LIBRARY.order(order % len(ORDERS))
        for shard_slice in SLICES:
            check_slice(shard_slice, dtype, offset, offset)
    for index, shard_slice in enumerate(drawn_slices(48)):
        _LIBRARY.order(index % len(ORDERS))
        check_slice(shard_slice, torch.uint8, index % 16, index // 4)


def many() -> None:
    """More tensors than go into a launch."""
    fulls = [random_bits((64, 6), torch.uint8, offset=index % 16) for index in range(700)]
    table = [1, 64, 6, 2, 2, 16, 16, 16, 6]
    before = _LIBRARY.launches
    shards = on_gpu("pack_many", fulls, table * 700)
    assert isinstance(shards, list) and _LIBRARY.launches == before + 2
    assert all(same(shard, full[16:32]) for full, shard in zip(fulls, shards, strict=True))


def rows() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for cap in (0.0, 30.0):
            logits, columns = batch(1031, dtype)
            total, _, gradient = exact(logits, columns, cap)
            found = on_gpu("vocab_statistics", logits, columns, cap)
            assert isinstance(found, Tensor) and found.dtype == torch.float32
            # A CPU's exponential differs from torch's by the last bit.
            assert torch.allclose(
                found, cross_entropy_kernels.statistics(logits, columns, cap=cap), 1e-5
            )
            scale = total.isfinite().float()
            on_gpu("vocab_gradient_", logits, total.float(), columns, scale, cap)
            kept = total.isfinite()
            assert (logits.double() - gradient)[kept].abs().max() < 4e-3 * gradient[
                kept
            ].abs().max()
            assert logits[~kept].eq(0).all()


def lookups() -> None:
    cases = (
        (torch.bfloat16, 4096, 0),
        (torch.float32, 33, 1),
        (torch.uint8, 5, 3),
        (torch.float64, 9000, 0),
    )
    for order, (dtype, features, offset) in enumerate(cases):
        _LIBRARY.order(order % len(ORDERS))
        weight = random_bits((7, features), dtype, offset=offset)
        for ids in (torch.arange(30).view(5, 6), torch.arange(30, dtype=torch.int32)[1:]):
            want = _OPS.lookup(weight, ids, 11, 30, -1)
            assert same(on_gpu("lookup", weight, ids, 11, 30, -1), want)
    strange = on_gpu("lookup", torch.ones(2, 3), torch.tensor([-1, 0, 5, 9]), 0, 9, -1)
    assert isinstance(strange, Tensor)
    assert strange.isnan().all(1).tolist() == [True, False, False, True]
    assert strange[1].eq(1).all() and strange[2].eq(0).all()
    for tokens, features in ((0, 3), (4, 0)):
        empty = on_gpu("lookup", torch.ones(2, features), torch.zeros(tokens).long(), 0, 9, -1)
        assert same(empty, torch.zeros(tokens, features))


def refusals() -> None:
    full, columns = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    print(failure(on_gpu, "pack", full, 3, 4, 1, [3, 2], [3, 2]))
    print(failure(on_gpu, "pack", full.t(), 4, 3, 1, [0, 1], [4, 1]))
    print(failure(on_gpu, "pack_many", [full], [3, 4, 1, 2, 2, 0, 1, 3]))
    print(failure(on_gpu, "compact_", full, 3, 4, 1, [2, 1, 0, 1], [3, 2]))
    print(failure(on_gpu, "unpack_", full, full[:, :1].clone().double(), 3, 4, 1, [0, 1]))
    print(failure(on_gpu, "vocab_statistics", full, columns[:2], 0.0))
    print(failure(on_gpu, "vocab_statistics", full, columns.int(), 0.0))
    print(failure(on_gpu, "vocab_statistics", full.double(), columns, 0.0))
    print(failure(on_gpu, "vocab_statistics", full, columns, -1.0))
    print(failure(on_gpu, "vocab_gradient_", full, torch.zeros(2), columns, torch.zeros(3), 0.0))
    print(failure(on_gpu, "lookup", full, columns.short(), 0, 9, -1))
    print(failure(on_gpu, "lookup", full.t(), columns, 0, 9, -1))
    print(failure(on_gpu, "lookup", full, columns, 7, 9, -1))


def results_and_refusals() -> None:
    copies()
    many()
    rows()
    lookups()
    refusals()


def errors() -> None:
    """Every launch fails."""
    full = torch.zeros(3, 4)
    print(failure(on_gpu, "pack", full, 3, 4, 1, [0, 1], [3, 1]))
    print(failure(on_gpu, "vocab_statistics", full, torch.zeros(3, dtype=torch.int64), 0.0))
    print(failure(on_gpu, "lookup", full, torch.zeros(3, dtype=torch.int64), 0, 3, -1))
    print(operators.unavailable_reason(0))
    print(operators.unavailable_reason(9))


def through_nccl() -> None:
    """Two processes, each with a communicator for cuda:0; the second one prints what it got."""
    made = torch.zeros(128, dtype=torch.uint8)
    _OPS.nccl_id_(made, "")
    rank = int(os.fork() == 0)
    number = _OPS.nccl_make("", made, rank, 2, 0, 20.0)
    want = torch.arange(1000.0)
    if rank == 0:
        _OPS.nccl_exchange(number, "scatter", [want], [1], [], [])
        back = torch.zeros(1000)
        _OPS.nccl_exchange(number, "gather", [], [], [back], [1])
        assert same(back, want)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
        return
    got = torch.zeros(1000)
    _OPS.nccl_exchange(number, "scatter", [], [], [got], [0])
    print("whole" if same(got, want) else "changed", flush=True)
    print(failure(_OPS.nccl_exchange, number, "scatter", [made], [0], [], []), flush=True)
    print(failure(_OPS.nccl_make, "", made, 0, 1, 9, 20.0)[:13], flush=True)
    os.environ["EMULATED_ERROR"] = "209"
    print(failure(_OPS.nccl_exchange, number, "gather", [got], [0], [], []), flush=True)
    os._exit(0)
