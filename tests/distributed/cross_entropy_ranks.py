# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a sharded vocabulary."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from deepspeed_autotp.vocab_parallel.cross_entropy import vocabulary_cross_entropy
from tests.support.column_shards import even_widths, layout_of, own_columns, world_group
from tests.support.peak_memory import PeakMemory
from tests.support.recorded_collectives import recorded_collectives

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def batch(tokens: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, some large, and labels with every border and some ignored; the same everywhere."""
    draw = torch.Generator().manual_seed(7)
    logits = (torch.randn(tokens, size, generator=draw, dtype=torch.float64) * 6).to(dtype)
    labels = torch.randint(0, size, (tokens,), generator=draw)
    labels[:4] = torch.tensor([0, size - 1, -100, size // 2])
    return logits, labels


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))


def against_one_process(
    name: str, size: int, widths: list[int] | None
) -> tuple[float, float, bytes]:
    """Worst relative error of losses and of this rank's gradient, and the bits of the losses."""
    full, labels = batch(37, size, DTYPES[name])
    layout = layout_of(widths or even_widths(size))
    weights = torch.rand(37, generator=torch.Generator().manual_seed(8))
    exact = full.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    (expected * weights).sum().backward()
    assert exact.grad is not None
    part = own_columns(full, layout)
    with recorded_collectives() as calls:
        losses = vocabulary_cross_entropy(part, labels, layout=layout, group=world_group())
        (losses * weights).sum().backward()
    assert calls == [("all-gather", 3 * 37 * losses.itemsize)]
    assert losses.dtype == (torch.float64 if name == "float64" else torch.float32)
    assert part.grad is not None and part.grad.dtype == part.dtype
    gradient = own_columns(exact.grad, layout, leaf=False)
    apart = relative(part.grad, gradient) if gradient.numel() else 0.0
    bits = bytes(losses.detach().view(torch.uint8).numpy())
    return relative(losses.detach(), expected.detach()), apart, bits


def in_chunks() -> float:
    """The largest difference between many chunks and one, in float64, at 1000 columns."""
    full, labels = batch(1500, 1000, torch.float64)
    layout = layout_of(even_widths(1000))
    exact = full.clone().requires_grad_()
    F.cross_entropy(exact, labels).backward()
    assert exact.grad is not None
    part = own_columns(full, layout)
    losses = vocabulary_cross_entropy(part, labels, layout=layout, group=world_group())
    (losses.sum() / (labels != -100).sum()).backward()
    assert part.grad is not None
    return relative(part.grad, own_columns(exact.grad, layout, leaf=False))


def soft_capped() -> tuple[float, float, str]:
    """Errors of losses and gradients with a soft cap, in float64; what a negative one raises."""
    full, labels = batch(20, 31, torch.float64)
    layout = layout_of(even_widths(31))
    exact = full.clone().requires_grad_()
    expected = F.cross_entropy(5 * torch.tanh(exact / 5), labels, reduction="none")
    expected.sum().backward()
    assert exact.grad is not None
    part = own_columns(full, layout)
    losses = vocabulary_cross_entropy(
        part, labels, layout=layout, group=world_group(), soft_cap=5.0
    )
    losses.sum().backward()
    assert part.grad is not None
    said = ""
    try:
        vocabulary_cross_entropy(part, labels, layout=layout, group=world_group(), soft_cap=-1.0)
    except ValueError as error:
        said = str(error)
    gradient = own_columns(exact.grad, layout, leaf=False)
    return relative(losses.detach(), expected.detach()), relative(part.grad, gradient), said


def nothing_to_learn() -> tuple[float, float, float]:
    """Losses and gradients of ignored labels, also where logits are infinite or NaN."""
    layout = layout_of(even_widths(11))
    logits = torch.full((3, 11), float("nan"))
    logits[0] = float("-inf")
    logits[1] = 1.0
    part = own_columns(logits, layout)
    labels = torch.full((3,), 5)
    losses = vocabulary_cross_entropy(
        part, labels, layout=layout, group=world_group(), ignore_index=5
    )
    losses.sum().backward()
    assert part.grad is not None
    no_tokens = own_columns(torch.zeros(0, 11), layout)
    empty = vocabulary_cross_entropy(no_tokens, labels[:0], layout=layout, group=world_group())
    empty.sum().backward()
    return (
        float(losses.detach().abs().max()),
        float(part.grad.abs().max()),
        float(empty.detach().sum()),
    )


def banned_columns() -> float:
    """A token whose allowed columns all lie with one rank: the others hold -inf alone."""
    layout = layout_of(even_widths(12))
    logits = torch.full((2, 12), float("-inf"), dtype=torch.float64)
    logits[0, :3] = torch.tensor([1.0, 2.0, 3.0])
    logits[1, 11] = 4.0
    labels = torch.tensor([1, 11])
    exact = logits.clone().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    expected.sum().backward()
    part = own_columns(logits, layout)
    losses = vocabulary_cross_entropy(part, labels, layout=layout, group=world_group())
    losses.sum().backward()
    assert part.grad is not None and exact.grad is not None
    gradient = (part.grad - own_columns(exact.grad, layout, leaf=False)).abs().max()
    return max(float((losses - expected).detach().abs().max()), float(gradient))


def outside(label: int) -> str:
    """The error for a label that no rank holds; every rank has it, so none waits."""
    layout = layout_of(even_widths(10))
    try:
        vocabulary_cross_entropy(
            torch.zeros(2, layout.widths[dist.get_rank()]),
            torch.tensor([3, label]),
            layout=layout,
            group=world_group(),
        )
    except ValueError as error:
        return str(error)
    return "no error"


def unfitting() -> list[str]:
    """The errors of shapes and shards that do not fit."""
    width = even_widths(10)[dist.get_rank()]
    cases: Any = [
        (torch.zeros(2, width + 1), torch.zeros(2, dtype=torch.int64), layout_of(even_widths(10))),
        (torch.zeros(2, width), torch.zeros(3, dtype=torch.int64), layout_of(even_widths(10))),
    ]
    said = []
    for logits, labels, layout in cases:
        try:
            vocabulary_cross_entropy(logits, labels, layout=layout, group=world_group())
        except ValueError as error:
            said.append(str(error))
    return said


def other_user(first: bool) -> str:
    """What becomes of another operation that needs the logits, before or after the loss."""
    full, labels = batch(8, 10, torch.float32)
    layout = layout_of(even_widths(10))
    source = own_columns(full, layout)
    logits = source * 1.0

    def loss() -> torch.Tensor:
        return vocabulary_cross_entropy(logits, labels, layout=layout, group=world_group()).sum()

    def square() -> torch.Tensor:
        return (logits * logits).sum()

    # Autograd runs what was made last first; the square needs its logits until it has run.
    total = square() + loss() if first else loss() + square()
    try:
        total.backward()
    except RuntimeError as error:
        return str(error)
    exact = full.clone().requires_grad_()
    (F.cross_entropy(exact, labels, reduction="sum") + (exact * exact).sum()).backward()
    assert source.grad is not None and exact.grad is not None
    return str(relative(source.grad, own_columns(exact.grad, layout, leaf=False)) < 1e-5)


def twice() -> tuple[bool, bool]:
    """A retained graph walked twice: whether the gradients agree and the logits are intact."""
    full, labels = batch(8, 10, torch.float32)
    layout = layout_of(even_widths(10))
    source = own_columns(full, layout)
    logits = source * 1.0
    before = logits.detach().clone()
    loss = vocabulary_cross_entropy(logits, labels, layout=layout, group=world_group()).sum()
    loss.backward(retain_graph=True)
    assert source.grad is not None
    once, intact = source.grad.clone(), torch.equal(logits.detach(), before)
    loss.backward()
    return torch.equal(source.grad, 2 * once), intact


def peak(name: str) -> float:
    """Most memory in a step, the logits with it, over the memory of the logits."""
    layout = layout_of(even_widths(16384))
    hidden = torch.zeros(1024, 4, dtype=DTYPES[name], requires_grad=True)
    weight = torch.zeros(layout.widths[dist.get_rank()], 4, dtype=DTYPES[name], requires_grad=True)
    labels = torch.zeros(1024, dtype=torch.int64)
    with PeakMemory() as memory:
        logits = F.linear(hidden, weight)
        at_first = memory.live
        assert at_first == logits.nbytes
        vocabulary_cross_entropy(
            logits, labels, layout=layout, group=world_group()
        ).sum().backward()
        return memory.most / at_first
