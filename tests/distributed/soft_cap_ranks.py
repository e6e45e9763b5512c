# SPDX-License-Identifier: Apache-2.0
"""Soft caps of logits that are sharded over the ranks."""

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deepspeed_autotp.vocab_parallel.logits import Logits, logits_from_shard
from tests.support.column_shards import even_widths, layout_of, own_columns, world_group
from tests.support.logits_and_labels import ROWS, SIZE, Use, against_full, flat, identity, labels
from tests.support.peak_memory import PeakMemory
from tests.support.recorded_collectives import recorded_collectives
from tests.support.recorded_soft_caps import recorded_soft_caps

CAP = 1.5
TENSOR = torch.tensor(CAP)


def weight(dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.Generator().manual_seed(5)
    return (torch.randn(2, ROWS, SIZE, generator=drawn, dtype=torch.float64) * 2).to(dtype)


def capped(x: Tensor) -> Tensor:
    """As Gemma2 does it."""
    x = x / CAP
    x = torch.tanh(x)
    return x * CAP


def read_before(x: Tensor, y: Tensor) -> Tensor:
    x = capped(x)
    with torch.inference_mode():
        assert (x * 2).shape == (2, ROWS, SIZE)
        assert x.argmax(-1).shape == (2, ROWS)
    return flat(x, y)


def other_number(x: Tensor, y: Tensor, *, by: Any = CAP, times: Any = CAP) -> Tensor:
    return flat(torch.tanh(x / by) * times, y)


def in_place(x: Tensor, y: Tensor) -> Tensor:
    x = x / CAP
    x.tanh_()
    return flat(x * CAP, y)


def divided_in_place(x: Tensor, y: Tensor) -> Tensor:
    x = x * 1
    x /= CAP
    return flat(torch.tanh(x) * CAP, y)


def changed_before(x: Tensor, y: Tensor) -> Tensor:
    """The logits below the cap are changed in place once it is there."""
    x = x * 1
    z = capped(x)
    x[..., 2] = 9.0
    return flat(z, y) + flat(x, y)


def steps_kept(x: Tensor, y: Tensor) -> Tensor:
    """Every result on the way is used, too."""
    a = x / CAP
    b = a.tanh()
    c = CAP * b
    return flat(c, y) + 2 * flat(a, y) + 3 * flat(b, y) + 4 * flat(x, y) + c.square().mean()


def hooked_before(x: Tensor, y: Tensor) -> Tensor:
    seen: list[Any] = []
    x = capped(x)
    x.register_hook(lambda dy: seen.append(dy.sum()))
    loss = flat(x, y)
    (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert len(seen) == 1 and abs(float(seen[0] - dx.sum())) < 1e-12
    return loss


def own_backward(x: Tensor, y: Tensor) -> Tensor:
    """A gradient is given to capped logits whose numbers nobody has read."""
    (dx,) = torch.autograd.grad(capped(x), x, torch.full(x.shape, 2.0, dtype=x.dtype))
    return (dx * x).sum()


def two_walks(x: Tensor, y: Tensor) -> Tensor:
    loss = flat(capped(x), y) + capped(x).square().mean()
    torch.autograd.grad(loss, x, retain_graph=True)
    return loss


def one_twice(x: Tensor, y: Tensor) -> Tensor:
    x = capped(x)
    return flat(x, y) + flat(x, y.roll(1, -1))


def entropy(x: Tensor, y: Tensor) -> Tensor:
    x = capped(x)
    return flat(x, y) + x.logsumexp(-1).square().mean()


def entropy_first(x: Tensor, y: Tensor) -> Tensor:
    x = capped(x)
    return x.logsumexp(-1).square().mean() + flat(x, y)


def rounded(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, CAP, rounding_mode="floor").tanh().mul(CAP).sum() + x.sum()


def checkpointed(x: Tensor, y: Tensor) -> Tensor:
    """Cap and loss are computed once more in the backward."""

    def part(x: Tensor) -> Tensor:
        z = capped(x)
        return flat(z, y) + z.square().mean()

    found: Tensor = checkpoint(part, x, use_reentrant=False)
    return found


def checkpointed_cap(x: Tensor, y: Tensor) -> Tensor:
    z = checkpoint(capped, x, use_reentrant=False)
    return flat(z, y) + z.square().mean()


# By use: its caps in the losses from shards, at most.
USES: dict[str, tuple[Use, list[float]]] = {
    "loss": (lambda x, y: flat(capped(x), y), [CAP]),
    "flat first": (lambda x, y: F.cross_entropy(capped(x.view(-1, SIZE)), y.view(-1)), [CAP]),
    "shifted": (
        lambda x, y: F.cross_entropy(
            capped(x)[..., :-1, :].contiguous().view(-1, SIZE), y[..., 1:].reshape(-1)
        ),
        [CAP],
    ),
    "methods": (lambda x, y: flat(x.div(CAP).tanh().mul(CAP), y), [CAP]),
    "number first": (lambda x, y: flat(CAP * F.tanh(x / CAP), y), [CAP]),
    "scaled before": (lambda x, y: flat(capped(x * 0.5), y), [CAP]),
    "whole number": (lambda x, y: other_number(x, y, by=2, times=2.0), [2.0]),
    "none": (lambda x, y: flat(capped(x), y, reduction="none").square().sum(), [CAP]),
    "cloned": (lambda x, y: flat(capped(x).clone(), y), [CAP]),
    "two losses": (lambda x, y: flat(capped(x), y) + flat(capped(x), y.roll(1, -1)), [CAP, CAP]),
    "one twice": (one_twice, [CAP, CAP]),
    "entropy": (entropy, [CAP]),
    "entropy first": (entropy_first, [0.0]),
    "raw loss": (lambda x, y: flat(capped(x), y) + flat(x, y), [CAP, 0.0]),
    "raw square": (lambda x, y: flat(capped(x), y) + (x * x).sum(), [CAP]),
    "scaled after": (lambda x, y: flat(capped(x) / 0.7, y), [0.0]),
    "capped twice": (lambda x, y: flat(capped(capped(x)), y), [CAP]),
    "given back": (lambda x, y: flat(identity(capped(x)), y), [0.0]),
    "read before": (read_before, [0.0]),
    "divided alone": (lambda x, y: flat(x / CAP, y), [0.0]),
    "divided and read twice": (lambda x, y: (lambda z: flat(z, y) + z.sum())(x / CAP), [0.0]),
    "no last step": (lambda x, y: flat(torch.tanh(x / CAP), y), [0.0]),
    "other number": (lambda x, y: other_number(x, y, times=2.0), [0.0]),
    "negative": (lambda x, y: other_number(x, y, by=-CAP, times=-CAP), [0.0]),
    "tensor": (lambda x, y: other_number(x, y, by=TENSOR, times=TENSOR), [0.0]),
    "rounded": (rounded, []),
    "in place": (in_place, []),
    "divided in place": (divided_in_place, []),
    "changed before": (changed_before, [0.0]),
    "steps kept": (steps_kept, [CAP, 0.0, 0.0, 0.0]),
    "hooked before": (hooked_before, [0.0]),
    "two walks": (two_walks, [CAP]),
    "checkpointed": (checkpointed, [CAP, CAP]),
    "checkpointed cap": (checkpointed_cap, [CAP]),
    "own backward": (own_backward, []),
}  # fmt: skip


def compare(name: str) -> dict[str, tuple[float, float, bool]]:
    """By use: the errors of value and gradient, and whether the losses had the caps expected."""
    dtype = {"float64": torch.float64, "float32": torch.float32}[name]
    found = {}
    for case, (use, expected_caps) in USES.items():
        value, gradient, caps = against_full(use, weight(dtype), recorded_soft_caps())
        found[case] = (value, gradient, caps == expected_caps)
    return found


def bits() -> dict[str, bool]:
    """Whether what is read has the bits of the three operations on a shard, both ways."""
    found = {}
    for name in ("float32", "bfloat16", "float16"):
        dtype = getattr(torch, name)
        layout = layout_of(even_widths(SIZE))
        part, plain = own_columns(weight(dtype), layout), own_columns(weight(dtype), layout)
        made = capped(logits_from_shard(part * 1, layout, world_group()))
        assert isinstance(made, Logits)
        wide = made.float()
        expected = capped(plain * 1)
        drawn = torch.rand(2, ROWS, SIZE, generator=torch.Generator().manual_seed(1))
        (wide * drawn).sum().backward()
        (expected.float() * own_columns(drawn, layout, leaf=False)).sum().backward()
        assert part.grad is not None and plain.grad is not None
        found[name] = torch.equal(made.shard, expected.detach())
        found[f"{name} gradient"] = torch.equal(part.grad, plain.grad)
    return found


def sixteen_bit() -> dict[str, Any]:
    """A bfloat16 chain that is cast to float32 before the loss, and one that is cast first."""
    layout = layout_of(even_widths(SIZE))
    exact = weight(torch.bfloat16).double().requires_grad_()
    expected = flat(capped(exact), labels())
    expected.backward()
    assert exact.grad is not None
    gradient = own_columns(exact.grad, layout, leaf=False)
    found: dict[str, Any] = {}
    for name, use in {
        "cast after": lambda x: capped(x).float(),
        "cast first": lambda x: capped(x.float()),
    }.items():
        part = own_columns(weight(torch.bfloat16), layout)
        with recorded_soft_caps() as seen:
            loss = flat(use(logits_from_shard(part * 1, layout, world_group())), labels())
        loss.backward()
        assert part.grad is not None
        apart = (part.grad.double() - gradient).abs().max() / gradient.abs().max()
        near = abs(float(loss.detach() - expected.detach())) < 1e-6 and float(apart) < 1e-2
        found[name] = (near, str(loss.dtype), seen == [CAP])
    return found


Later = Callable[[Tensor], tuple[Tensor, Callable[[], Tensor], Tensor]]


def afterwards() -> dict[str, str]:
    """What is read after the backward: the values, or how the error begins."""
    return {use.__name__: _read_after(use) for use in _later_uses()}


def _read_after(use: Later) -> str:
    layout = layout_of(even_widths(SIZE))
    loss, read, expected = use(
        logits_from_shard(own_columns(weight(), layout) * 1, layout, world_group())
    )
    loss.backward()
    try:
        return "right" if torch.equal(read() + 0, expected) else "wrong"
    except RuntimeError as error:
        return str(error)[:50]


def _later_uses() -> tuple[Later, ...]:
    """From logits to a loss, what is read after its backward, and what that is."""
    full = weight()

    def only(x: Tensor) -> Any:
        z = capped(x)
        return flat(z, labels()), lambda: z.detach(), capped(full)

    def seen(x: Tensor) -> Any:
        z = capped(x)
        loss = flat(z, labels())
        z.max()
        return loss, lambda: z.detach(), capped(full)

    def below(x: Tensor) -> Any:
        """The loss is formed from the logits below the cap."""
        z, half = capped(x), x / 2
        return flat(x, labels()), lambda: z.detach() + half.detach(), capped(full) + full / 2

    def quotient(x: Tensor) -> Any:
        z = x / CAP
        return flat(torch.tanh(z) * CAP, labels()), lambda: z.detach(), full / CAP

    def raw(x: Tensor) -> Any:
        return flat(capped(x), labels()), lambda: x.detach(), full

    def copy(x: Tensor) -> Any:
        z = capped(x)
        return flat(z.clone(), labels()), lambda: z.detach(), capped(full)

    def twice(x: Tensor) -> Any:
        """The second loss is formed from numbers that were read."""
        z = capped(x)
        first = flat(z, labels())
        z.max()
        return first + flat(z, labels()), lambda: z.detach() * 1, capped(full)

    return only, seen, below, quotient, raw, copy, twice


def _said(use: Callable[[], Any]) -> str:
    """The error of ``use``."""
    try:
        return f"no error, but {use()}"
    except RuntimeError as error:
        return str(error)


def another_view() -> list[str]:
    """Uses of capped logits that were changed in place through another view."""
    layout = layout_of(even_widths(SIZE))
    z = capped(logits_from_shard(own_columns(weight(), layout) * 1, layout, world_group()))
    view = z.view(-1, SIZE)
    z[..., 0] = 5.0
    uses: list[Callable[[], Any]] = [
        lambda: F.cross_entropy(view, labels().view(-1)),
        lambda: view.clone(),
        lambda: view.sum(),
        lambda: view * 2,
        lambda: view / 2,
    ]
    return [_said(use) for use in uses]


def too_late_to_watch() -> list[str]:
    layout = layout_of(even_widths(SIZE))
    z = capped(logits_from_shard(own_columns(weight(), layout) * 1, layout, world_group()))
    loss = flat(z, labels())
    quotient = logits_from_shard(own_columns(weight(), layout) * 1, layout, world_group()) / CAP
    assert torch.tanh(quotient).shape == z.shape
    seen = capped(logits_from_shard(own_columns(weight(), layout) * 1, layout, world_group()))
    other = flat(seen, labels())
    assert seen.max() > 0  # its numbers are there from now on
    uses: list[Callable[[], Any]] = [
        quotient.retain_grad,
        z.retain_grad,
        lambda: torch.autograd.grad(loss, [z]),
        seen.retain_grad,
        lambda: torch.autograd.grad(other + seen.square().mean(), [seen]),
    ]
    return [_said(use) for use in uses]


def peak(first_cap: float, last_cap: float) -> float:
    """Most memory in a step over that of the shard, which is freed as a model frees it."""
    width = 16384
    layout = layout_of(even_widths(width))
    hidden = torch.zeros(1024, 4, requires_grad=True)
    head = torch.zeros(layout.widths[0], 4, requires_grad=True)
    y = torch.zeros(1024, dtype=torch.int64)
    gc.disable()
    try:
        with PeakMemory() as memory:
            x = logits_from_shard(F.linear(hidden, head), layout, world_group())
            at_first = memory.live
            x = x / first_cap
            x = torch.tanh(x)
            x = x * last_cap
            F.cross_entropy(x.float().view(-1, width), y).backward()
            return memory.most / at_first
    finally:
        gc.enable()


def divided_peak() -> tuple[float, float]:
    """Most memory of a step whose logits are divided alone, over the shard, and once divided."""
    width = 16384
    layout = layout_of(even_widths(width))
    hidden = torch.zeros(1024, 4, requires_grad=True)
    head = torch.zeros(layout.widths[0], 4, requires_grad=True)
    y = torch.zeros(1024, dtype=torch.int64)
    with PeakMemory() as memory:
        x = logits_from_shard(F.linear(hidden, head), layout, world_group())
        at_first = memory.live
        x = x / 3.0
        loss = F.cross_entropy(x.float().view(-1, width), y)
        between = memory.live
        loss.backward()
        return memory.most / at_first, between / at_first


def gathers() -> list[tuple[str, int]]:
    """The collectives of a step with a cap."""
    layout = layout_of(even_widths(SIZE))
    with recorded_collectives() as calls:
        flat(
            capped(logits_from_shard(own_columns(weight(), layout) * 1, layout, world_group())),
            labels(),
        ).backward()
    return calls
