# SPDX-License-Identifier: Apache-2.0
"""Kernels on a GPU: time, and the share of the bandwidth that a copy reaches on the same device.

The bound of a copy is the bytes it reads and writes; of cross-entropy one reading of the logits for
the loss and one reading and one writing for the gradient; of a lookup every row written once and
this rank's read once, and with its gradient those read again and the weight's size written. The
bandwidth is that of a plain copy of 2 GiB from device to device, measured in the same run; of
shards that come from CPU memory it is that of a pinned copy of as many bytes. Without a GPU
nothing is measured, which is exit status 2.

A copy, a loss and a lookup are timed from the moment at which the device starts on them, since in
training the CPU is ahead of it; thousands of small tensors, and what comes from CPU memory, from
the call on.
"""

import argparse
import functools
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from deepspeed_autotp.layers.embedding_lookup import lookup
from deepspeed_autotp.native import operators, packing
from deepspeed_autotp.sharding.pinned_copy import PinnedCopy
from deepspeed_autotp.vocab_parallel import cross_entropy_kernels

# Cycles that the device sleeps, some ten milliseconds, while the CPU gets ahead of it.
_AHEAD = 20_000_000


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Case:
    """``run`` moves at least ``moved`` bytes; ``rival`` is the best that others have for it.

    ``bound`` is the least time in seconds, where it is not that of a copy on the device.
    ``before`` is done ahead of each run and not timed. ``ahead`` is whether the CPU is ahead of
    the device when it starts.
    """

    name: str
    moved: int
    run: Callable[[], object]
    rival: Callable[[], object]
    rival_name: str
    bound: float = 0.0
    before: Callable[[], object] = _nothing
    ahead: bool = True


def seconds(
    run: Callable[[], object],
    repeats: int,
    *,
    before: Callable[[], object] = _nothing,
    ahead: bool = True,
) -> float:
    """The median of ``repeats``, after two that load code and fill caches."""
    times = []
    for index in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(_AHEAD)
        begin.record()
        run()
        end.record()
        end.synchronize()
        if index >= 2:
            times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def copy_bandwidth(repeats: int, gib: int) -> float:
    """Bytes read and written a second by a plain copy."""
    source = torch.randint(256, (gib << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), repeats)


def copies(features: int) -> Iterator[Case]:
    """Shards of [features, features] weights over four ranks, for the last rank."""
    full = torch.randn(features, features, dtype=torch.bfloat16, device="cuda")
    width = features // 4
    start = features - width
    shard = torch.empty(width, features, dtype=full.dtype, device="cuda")
    moved = 2 * shard.nbytes

    def pack(view: tuple[int, int, int], runs: tuple[int, ...], shape: tuple[int, int]) -> Tensor:
        return packing.pack(full, view=view, runs=runs, shape=shape)

    rows, columns = (1, features, features), (features, features, 1)
    yield Case(
        "pack column",
        moved,
        lambda: pack(rows, (start, width), (width, features)),
        lambda: full.narrow(0, start, width).clone(),
        "narrow().clone()",
    )
    yield Case(
        "pack row",
        moved,
        lambda: pack(columns, (start, width), (features, width)),
        lambda: full.narrow(1, start, width).contiguous(),
        "narrow().contiguous()",
    )
    third, part = features // 3, features // 12
    fused = tuple(n for piece in range(3) for n in (piece * third + part, part))
    yield Case(
        "pack fused q|k|v",
        2 * 3 * part * features * 2,
        lambda: pack(rows, fused, (3 * part, features)),
        lambda: torch.cat([full.narrow(0, at, part) for at in fused[::2]]),
        "cat of narrows",
    )
    yield Case(
        "unpack column",
        moved,
        lambda: packing.unpack_(full, shard, view=rows, runs=(start, width)),
        lambda: full.narrow(0, start, width).copy_(shard),
        "narrow().copy_()",
    )


def many(count: int) -> Iterator[Case]:
    """Small tensors of a MoE, their shards made anew."""
    fulls = [torch.empty(256, 64, device="cuda").bfloat16() for _ in range(count)]
    slices = [packing.ShardSlice(view=(1, 256, 64), runs=(64, 64), shape=(64, 64))] * count
    yield Case(
        f"pack {count} tensors",
        count * 2 * 64 * 64 * 2,
        lambda: packing.pack_many(fulls, slices),
        lambda: [full.narrow(0, 64, 64).clone() for full in fulls],
        "narrow().clone() each",
        ahead=False,
    )


def losses(tokens: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    """Forward and backward of cross-entropy over [tokens, width]."""
    drawn = torch.randn(tokens, width, dtype=dtype, device="cuda")
    logits = drawn.clone()
    columns = torch.randint(0, width, (tokens,), device="cuda")
    scale = torch.full((tokens,), 1 / tokens, device="cuda")
    leaf = drawn.clone().requires_grad_()

    def restore() -> None:
        """Undo what gradients have overwritten: ours the logits, liger's its input."""
        leaf.grad = None
        logits.copy_(drawn)
        leaf.detach().copy_(drawn)

    def ours() -> None:
        found = cross_entropy_kernels.statistics(logits, columns)
        cross_entropy_kernels.differentiate_(logits, found[1].log() + found[0], columns, scale)

    def eager() -> None:
        F.cross_entropy(leaf, columns).backward()

    name = f"cross-entropy [{tokens}, {width}] {str(dtype).removeprefix('torch.')}"
    yield Case(name, 3 * logits.nbytes, ours, eager, "F.cross_entropy", before=restore)
    try:
        rival = importlib.import_module("liger_kernel.transformers").LigerCrossEntropyLoss()
    except ImportError:
        return

    def liger() -> None:
        rival(leaf.view_as(leaf), columns).backward()

    yield Case(name, 3 * logits.nbytes, ours, liger, "liger-kernel", before=restore)


def lookups(tokens: int, held: int, dtype: torch.dtype) -> Iterator[Case]:
    """A rank's shard of an embedding over four ranks."""
    features, ranks = 4096, 4
    weight = torch.randn(held, features, device="cuda").to(dtype).requires_grad_()
    ids = torch.randint(0, ranks * held, (tokens,), device="cuda")
    dy = torch.randn(tokens, features, device="cuda").to(dtype)

    def ours() -> Tensor:
        return lookup(weight, ids, start=held, size=ranks * held)

    def masked() -> Tensor:
        elsewhere = (ids < held) | (ids >= 2 * held)
        local = (ids - held).masked_fill_(elsewhere, 0)
        return F.embedding(local, weight).masked_fill(elsewhere.unsqueeze(-1), 0)

    shape = f"[{tokens}, {features}] of {held} rows {str(dtype).removeprefix('torch.')}"
    moved = dy.nbytes + dy.nbytes // ranks
    yield Case(f"lookup {shape}", moved, ours, masked, "embedding, masked")
    yield Case(
        f"lookup and gradient {shape}",
        moved + dy.nbytes // ranks + weight.nbytes,
        lambda: torch.autograd.grad(ours(), weight, dy),
        lambda: torch.autograd.grad(masked(), weight, dy),
        "embedding, masked",
    )


def arrivals(layers: int, repeats: int) -> Iterator[Case]:
    """Column and row shards over four ranks of weights in CPU memory."""
    fulls = [torch.empty(8192, 8192, dtype=torch.bfloat16).fill_(1) for _ in range(2 * layers)]
    column = packing.ShardSlice(view=(1, 8192, 8192), runs=(2048, 2048), shape=(2048, 8192))
    row = packing.ShardSlice(view=(8192, 8192, 1), runs=(2048, 2048), shape=(8192, 2048))
    device = torch.device("cuda", torch.cuda.current_device())
    moved = sum(full.nbytes for full in fulls) // 4
    pinned = torch.empty(moved, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(moved, dtype=torch.uint8, device="cuda")

    def ours(pinned: PinnedCopy) -> None:
        for index, full in enumerate(fulls):
            pinned.shard(full, row if index % 2 else column)

    bound = seconds(lambda: target.copy_(pinned, non_blocking=True), repeats)
    for mib in (4, 8, 16, 32):
        yield Case(
            f"CPU to GPU, {4 * moved / 1e9:.1f} GB, buffers of {mib} MiB",
            moved,
            functools.partial(ours, PinnedCopy(device, buffer=mib << 20)),
            lambda: [full.chunk(4, index % 2)[1].cuda() for index, full in enumerate(fulls)],
            "chunk().cuda()",
            bound,
            ahead=False,
        )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    yield from copies(options.features)
    yield from many(options.tensors)
    for dtype in (torch.bfloat16, torch.float32):
        yield from losses(options.tokens, options.width, dtype)
        yield from lookups(options.tokens, options.width, dtype)
    yield from arrivals(options.layers, options.repeats)


def measured(case: Case, bandwidth: float, repeats: int) -> str:
    """A row of the table. What cannot be run says why in its place."""

    def time_of(run: Callable[[], object]) -> float:
        return seconds(run, repeats, before=case.before, ahead=case.ahead)

    took = time_of(case.run)
    share = (case.bound or case.moved / bandwidth) / took
    ours = f"{case.name:44} {took * 1e3:9.3f} {share:13.0%}  {case.rival_name:24}"
    try:
        rival = time_of(case.rival)
    except Exception as error:  # of anybody's code: no memory, no compiler
        return f"{ours} {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return f"{ours} {rival * 1e3:9.3f} {took / rival:13.2f}"


def report(options: argparse.Namespace, console: Console) -> None:
    """Row after row, each as soon as it is measured."""
    bandwidth = copy_bandwidth(options.repeats, options.gib)
    console.print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e12:.2f} TB/s")
    head = f"{'case':44} {'ms':>9} {'of the bound':>13}  {'against':24} {'ms':>9}"
    console.print(f"{head} {'ours / theirs':>13}")
    for case in cases(options):
        row = measured(case, bandwidth, options.repeats)
        console.print(row, markup=False, highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=24576)
    parser.add_argument("--layers", type=int, default=26, help="of two weights of 128 MiB")
    parser.add_argument("--tensors", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=32064)
    parser.add_argument("--gib", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    console = Console(width=140)
    if not torch.cuda.is_available():
        console.print(f"no GPU: nothing was measured (torch {torch.__version__})")
        return 2
    library = operators.find_library()
    if reason := library.reason or operators.unavailable_reason(torch.cuda.current_device()):
        console.print(f"the kernels do not run here, so nothing was measured: {reason}")
        return 2
    archs = ", ".join(map(str, library.archs))
    console.print(f"torch {torch.__version__}, CUDA library for {archs}")
    report(options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
