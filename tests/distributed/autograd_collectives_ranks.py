# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_autograd_collectives.py do."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp.distributed.autograd_collectives import (
    ShardLayout,
    copy_to_tp_region,
    gather_from_tp_region,
    reduce_from_tp_region,
    scatter_to_tp_region,
)
from deepspeed_autotp.distributed.process_group import TPGroup

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def world_group() -> TPGroup:
    assert dist.group.WORLD is not None
    return TPGroup(dist.group.WORLD)


def one_run_each(ranks: int) -> ShardLayout:
    """Uneven shards: rank 0 has the most."""
    widths = tuple(ranks + 1 - rank for rank in range(ranks))
    starts = [sum(widths[:rank]) for rank in range(ranks)]
    return ShardLayout(sum(widths), widths, tuple(zip(starts, widths, strict=True)))


def two_runs_each(ranks: int) -> ShardLayout:
    """As of a fused weight of two pieces, the ranks of the second in another order."""
    runs = tuple((2 * r, 2, 2 * ranks + 3 * (ranks - 1 - r), 3) for r in range(ranks))
    return ShardLayout(5 * ranks, (5,) * ranks, runs)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype)


def by_rank(*shape: int, seed: int) -> list[Tensor]:
    """What every rank holds, known to all."""
    return [draw(*shape, seed=seed + 100 * rank) for rank in range(dist.get_world_size())]


def own_part(full: Tensor, layout: ShardLayout, rank: int) -> Tensor:
    runs = layout.runs[rank]
    return torch.cat(
        [full[..., s : s + n] for s, n in zip(runs[::2], runs[1::2], strict=True)], dim=-1
    )


def through(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """``y`` and ``dx``; the input of ``function`` is not a leaf, as in a model."""
    leaf = x.clone().requires_grad_()
    y = function(leaf * 1)
    y.backward(dy)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def duals() -> dict[str, float]:
    """Errors of ``y`` and ``dx`` of every function, against its table."""
    group, rank, ranks = world_group(), dist.get_rank(), dist.get_world_size()
    found: dict[str, float] = {}

    def note(name: str, got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
        for what, a, b in zip(("y", "dx"), got, expected, strict=True):
            found[f"{name} {what}"] = (
                float((a - b).abs().max()) if a.shape == b.shape else float("inf")
            )

    xs, dys = by_rank(2, 3, seed=1), by_rank(2, 3, seed=2)
    x, dy = xs[rank], dys[rank]
    total, gradient = torch.stack(xs).sum(0), torch.stack(dys).sum(0)
    note("copy", through(lambda x: copy_to_tp_region(x, group), x, dy.clone()), (x, gradient))
    note("sum", through(lambda x: reduce_from_tp_region(x, group), x, dy.clone()), (total, dy))
    for name, layout in (("one", one_run_each(ranks)), ("two", two_runs_each(ranks))):
        full, dfull = draw(2, 3, layout.size, seed=3), draw(2, 3, layout.size, seed=4)
        part, dpart = own_part(full, layout, rank), own_part(dfull, layout, rank)
        gathered = through(lambda x, p=layout: gather_from_tp_region(x, p, group), part, dfull)
        note(f"gather {name}", gathered, (full, dpart))
        taken = through(lambda x, p=layout: scatter_to_tp_region(x, p, group), full, dpart)
        note(f"take {name}", taken, (part, dfull))
        strided = through(
            lambda x, p=layout: scatter_to_tp_region(x.transpose(0, 1), p, group),
            full.transpose(0, 1).contiguous(),
            dpart,
        )
        note(f"take {name} strided", strided, (part, dfull.transpose(0, 1)))
    expanded = through(lambda x: copy_to_tp_region(x, group), x, dy[:, :1].expand(2, 3))
    note("copy expanded", expanded, (x, gradient[:, :1].expand(2, 3)))
    return found


def inputs_are_kept() -> bool:
    """Whether all but ``reduce_from_tp_region``, by its contract, leave their input unchanged."""
    group, layout = world_group(), one_run_each(dist.get_world_size())
    full = draw(2, layout.size, seed=3)
    part = own_part(full, layout, group.rank)
    before = full.clone(), part.clone()
    copy_to_tp_region(full, group)
    scatter_to_tp_region(full, layout, group).zero_()
    gather_from_tp_region(part, layout, group).zero_()
    return torch.equal(full, before[0]) and torch.equal(part, before[1])


def types() -> dict[str, bool]:
    """Whether every floating type goes through with its own type and value."""
    group, rank, ranks = world_group(), dist.get_rank(), dist.get_world_size()
    layout = one_run_each(ranks)
    found = {}
    for dtype in DTYPES:
        full = draw(3, layout.size, seed=5, dtype=dtype)
        gathered = gather_from_tp_region(own_part(full, layout, rank), layout, group)
        found[f"gather {dtype}"] = gathered.dtype is dtype and torch.equal(gathered, full)
        summed = reduce_from_tp_region(torch.full((3,), 0.5, dtype=dtype), group)
        found[f"sum {dtype}"] = summed.dtype is dtype and summed.tolist() == [0.5 * ranks] * 3
    return found


def moved() -> dict[str, bool]:
    """Whether a group carries every type and shape, gathered from all or sent by the first."""
    group, rank, ranks = world_group(), dist.get_rank(), dist.get_world_size()
    makers: dict[str, Callable[[int], Tensor]] = {
        "bool": lambda r: torch.tensor([r % 2 == 0, True]),
        "int16": lambda r: torch.tensor([r, -r], dtype=torch.int16),
        "int64": lambda r: torch.tensor([[2**40 + r]]),
        "complex": lambda r: torch.tensor([1 + 1j * r, -2j]),
        "float8": lambda r: torch.tensor([1.0, r]).to(torch.float8_e4m3fn),
        "scalar": lambda r: torch.tensor(1.5 + r),
        "empty": lambda r: torch.empty(0, 3),
        "strided": lambda r: (torch.arange(6.0).reshape(2, 3) + r).t(),
    }
    found = {}
    for name, make in makers.items():
        mine, firsts = make(rank), make(0)
        all_of_them = group.all_gather(mine, [mine.shape] * ranks)
        found[f"gather {name}"] = all(_same(a, make(r)) for r, a in enumerate(all_of_them))
        group.broadcast(mine)
        found[f"broadcast {name}"] = _same(mine, firsts)
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    if a.dtype is torch.float8_e4m3fn:
        a, b = a.float(), b.float()
    return torch.equal(a, b)


def in_blocks(subgroups: tuple[tuple[int, int], ...]) -> tuple[list[float], float]:
    """Sums over the subgroups of a group, and over other groups made afterwards, some of which
    torch finds by the number of groups that a rank has."""
    group, rank = world_group(), dist.get_rank()
    sums = []
    for _ in range(2):
        group.open_subgroups([subgroups])
        sums.append(float(group.all_reduce_in(subgroups, torch.tensor([2.0**rank]))))
    everyone = dist.new_group(use_local_synchronization=True)
    total = torch.ones(())
    dist.all_reduce(total, group=everyone)
    pair = None
    if rank in _ends():
        pair = dist.new_group(list(_ends()), use_local_synchronization=True)
    if pair is not None:
        dist.barrier(group=pair)
    return sums, float(total)


def _ends() -> tuple[int, int]:
    return 0, dist.get_world_size() - 1


def announced() -> int:
    """How often a group tells of a collective, for one of each kind."""
    group, seen = world_group(), []
    layout = one_run_each(group.size)
    group.before_collective = lambda what: seen.append(1)
    group.all_reduce(torch.ones(1))
    full = gather_from_tp_region(
        own_part(torch.ones(layout.size), layout, group.rank), layout, group
    )
    scatter_to_tp_region(full, layout, group)
    group.before_collective = None
    group.all_reduce(torch.ones(1))
    return len(seen)
