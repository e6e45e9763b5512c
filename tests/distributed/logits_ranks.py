# SPDX-License-Identifier: Apache-2.0
"""What a model, a loss or a training script may do with logits."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deepspeed_autotp.vocab_parallel.logits import Logits, logits_from_shard
from tests.support.column_shards import even_widths, layout_of, own_columns, world_group
from tests.support.logits_and_labels import ROWS, SIZE, Use, against_full, flat, identity, labels
from tests.support.recorded_collectives import recorded_collectives


def _weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class _Square(torch.autograd.Function):
    """An operation that knows nothing of logits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy * ctx.saved_tensors[0]


def square(x: Tensor) -> Tensor:
    y: Tensor = _Square.apply(x)
    return y


def shifted(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x[..., :-1, :].contiguous().view(-1, SIZE), y[..., 1:].reshape(-1))


def selected(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x[y != -100], y[y != -100])


# Done on the shards: no more than one collective, that of the loss.
ON_SHARDS: dict[str, Use] = {
    "mean": flat,
    "sum": lambda x, y: flat(x, y, reduction="sum"),
    "none": lambda x, y: flat(x, y, reduction="none").square().sum(),
    "another ignored label": lambda x, y: flat(x, y.clamp(min=0), ignore_index=3),
    "shifted": shifted,
    "selected": selected,
    "scaled": lambda x, y: flat(x / 3.0, y),
    "reflected": lambda x, y: flat(1.5 + 2.0 * x, y) + flat(1 - x, y) * 0.5,
    "capped": lambda x, y: flat(torch.tanh(x / 3.0) * 3.0, y),
    "capped at the end": lambda x, y: flat(torch.tanh(x), y),
    "clamped at the end": lambda x, y: flat(x.clamp(-1, 1), y),
    "constant bias": lambda x, y: flat(x + _weight(SIZE), y),
    "row scale": lambda x, y: flat(x * _weight(ROWS, 1), y),
    "two kinds of itself": lambda x, y: flat(x * x - 2 * x, y),
    "two losses": lambda x, y: flat(x, y) + flat(x, y.roll(1, -1)),
    "cast": lambda x, y: flat(x.to(torch.float64).double(), y),
    "reshaped": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten()),
    "one row": lambda x, y: F.cross_entropy(x[0, 2:3], y[0, 2:3]),
    "unsqueezed": lambda x, y: flat(x.unsqueeze(0).squeeze(0), y),
    "module": lambda x, y: torch.nn.CrossEntropyLoss()(x.view(-1, SIZE), y.view(-1)),
    "its input given back": lambda x, y: flat(identity(x), y),
    "cloned": lambda x, y: flat(x.clone(), y),
}

# Done on the full logits: more collectives gather them.
ON_FULL_LOGITS: dict[str, Use] = {
    "sum of all": lambda x, y: x.square().sum(),
    "logsumexp": lambda x, y: flat(x, y) + x.logsumexp(-1).square().mean(),
    "its own square": lambda x, y: flat(x, y) + x.pow(2).mean(),
    "log softmax": lambda x, y: F.nll_loss(F.log_softmax(x.view(-1, SIZE), -1), y.view(-1)),
    "smoothed": lambda x, y: flat(x, y, label_smoothing=0.1),
    "weighted": lambda x, y: flat(x, y, weight=_weight(SIZE).abs()),
    "channels second": lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
    "columns": lambda x, y: x[..., 3:9].sum() * 2 + x[:, :, 4].sum(),
    "last axis moved": lambda x, y: x[..., None].square().sum(),
    "matmul": lambda x, y: (x @ _weight(SIZE, 3)).square().sum(),
    "in a list": lambda x, y: torch.cat([x, x * 2]).square().sum() + torch.stack([x, x]).sum(),
    "largest": lambda x, y: x.max(-1).values.sum() + x.topk(2).values.sum(),
    "mask": lambda x, y: flat(x.masked_fill(_weight(SIZE) > 0.5, -1e4), y),
    "where": lambda x, y: flat(torch.where(_weight(SIZE) > 0.5, -50.0, x), y),
    "all in one row": lambda x, y: x.reshape(-1).square().sum() + x.view(2, -1).sum(),
    "divided in place": lambda x, y: flat((x * 1).div_(2), y),
    "element of it": lambda x, y: x[1, 2, 3] * 2,
    "unbound": lambda x, y: sum((row.square().sum() for row in x), torch.zeros(())),
    "distance": lambda x, y: F.mse_loss(x.softmax(-1), x.detach().softmax(-1).roll(1, -1)),
    "parameter": lambda x, y: flat(x * torch.ones(1, dtype=x.dtype, requires_grad=True), y),
    "unknown operation": lambda x, y: square(x.sigmoid() + 0.0 * x.sum()).sum(),
}


def changed_in_place(x: Tensor, y: Tensor) -> Tensor:
    x = x * 1
    x[..., 2] = -7.0
    return flat(x, y)


def seen_before(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        assert x.argmax(-1).shape == (2, ROWS)
    return flat(x, y) + x.square().sum()


def detached_after(x: Tensor, y: Tensor) -> Tensor:
    """Seen, and seen once more without a gradient."""
    view = x.view(-1, SIZE)
    assert torch.equal(x.argmax(-1), x.detach().argmax(-1))
    return F.cross_entropy(view, y.view(-1)) + x.square().sum()


def teacher(x: Tensor, y: Tensor) -> Tensor:
    """What is detached has no gradient."""
    assert not x.detach().requires_grad and x.requires_grad
    return (x.detach() * x).sum()


def hooked(x: Tensor, y: Tensor) -> Tensor:
    seen: list[Any] = []
    x.register_hook(lambda dy: seen.append((dy.shape, float(dy.sum()))))
    loss = flat(x, y) + x.logsumexp(-1).sum()
    (again,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert seen[0][0] == x.shape and abs(seen[0][1] - float(again.sum())) < 1e-12
    return loss


ON_FULL_LOGITS |= {
    "changed in place": changed_in_place,
    "seen before": seen_before,
    "detached after": detached_after,
    "teacher": teacher,
    "hooked": hooked,
}


def compare(kind: str) -> dict[str, tuple[float, float, int]]:
    """By use: the error of value and gradient, and how often logits were gathered."""
    found = {}
    for name, use in {"shards": ON_SHARDS, "full": ON_FULL_LOGITS}[kind].items():
        full = _weight(2, ROWS, SIZE)
        value, gradient, calls = against_full(use, full, recorded_collectives())
        found[name] = (value, gradient, sum(1 for _, size in calls if size > 3 * 2 * ROWS * 8))
    return found


def sixteen_bit() -> dict[str, Any]:
    """A cast to float32 before the loss copies nothing, and reads as float32."""
    layout = layout_of(even_widths(SIZE))
    full = _weight(2, ROWS, SIZE).bfloat16()
    reference = full.clone().requires_grad_()
    expected = flat(reference.float(), labels())
    expected.backward()
    part = own_columns(full, layout)
    logits = logits_from_shard(part * 1, layout, world_group())
    wide = logits.float()
    assert isinstance(logits, Logits) and isinstance(wide, Logits)
    loss = flat(wide, labels())
    before = torch.equal(wide.detach() + 0.0, full.float())
    loss.backward()
    assert part.grad is not None and reference.grad is not None
    apart = (part.grad - own_columns(reference.grad, layout, leaf=False)).abs().max()
    return {
        "dtypes": (str(logits.dtype), str(wide.dtype), str(loss.dtype), str(part.grad.dtype)),
        "one memory": wide.shard.data_ptr() == logits.shard.data_ptr() and wide.memory.spent,
        "loss": abs(float(loss.detach() - expected.detach())) < 1e-6,
        "gradient": float(apart) < 1e-3,
        "values": before,
        "full gradient": _gradient_of_cast(full),
    }


def _gradient_of_cast(full: Tensor) -> bool:
    layout = layout_of(even_widths(SIZE))
    part = own_columns(full, layout)
    logits_from_shard(part * 1, layout, world_group()).float().square().sum().backward()
    reference = full.clone().requires_grad_()
    reference.float().square().sum().backward()
    assert part.grad is not None and reference.grad is not None
    return torch.equal(part.grad, own_columns(reference.grad, layout, leaf=False))


def ways_out() -> dict[str, bool]:
    """Whether what leaves torch's functions holds the full logits."""
    full = _weight(2, ROWS, SIZE)
    layout = layout_of(even_widths(SIZE))

    def fresh() -> Tensor:
        return logits_from_shard(own_columns(full, layout), layout, world_group()).detach()

    stored = io.BytesIO()
    torch.save(fresh(), stored)
    stored.seek(0)
    received = [torch.empty_like(full) for _ in range(dist.get_world_size())]
    dist.all_gather(received, fresh())
    summed = fresh()
    dist.all_reduce(summed)
    copied, mapped = fresh(), fresh()
    mapped.data.mul_(2)
    return {
        "numpy": bool((fresh().numpy() == full.numpy()).all()),
        "array": bool((numpy.asarray(fresh()) == full.numpy()).all()),
        "list": fresh().tolist() == full.tolist(),
        "item": fresh()[1, 2, 3].item() == full[1, 2, 3].item(),
        "pickle": torch.equal(pickle.loads(pickle.dumps(fresh())), full),
        "save": torch.equal(torch.load(stored), full),
        "deepcopy": torch.equal(copy.deepcopy(copied), full),
        "copy": torch.equal(copy.copy(copied), full),
        "iteration": torch.equal(torch.stack(list(fresh())), full),
        "length": len(fresh()) == 2,
        "dlpack": torch.equal(torch.from_dlpack(fresh()), full),
        "plain": type(fresh() + 0.0 * full.sum(0, keepdim=True).requires_grad_()) is Tensor,
        "sent": all(torch.equal(x, full) for x in received),
        "summed in place": torch.equal(summed + 0, dist.get_world_size() * full),
        "changed as data": torch.equal(mapped.clone() + 0, 2 * full),
        "device": torch.equal(fresh().to("cpu", torch.float32) + 0, full.float()),
    }


def printed() -> list[str]:
    """What one rank alone may print without waiting for the others."""
    x = logits_from_shard(
        _weight(2, 3, even_widths(SIZE)[dist.get_rank()]),
        layout_of(even_widths(SIZE)),
        world_group(),
    )
    with recorded_collectives() as calls:
        said = [repr(x), str(x), f"{x}"] if dist.get_rank() == 0 else []
    assert not calls
    return said


def too_late() -> list[str]:
    """Logits that are used first after the backward, and a view that is out of date."""
    layout = layout_of(even_widths(SIZE))
    logits = logits_from_shard(
        own_columns(_weight(2, ROWS, SIZE), layout) * 1, layout, world_group()
    )
    flat(logits, labels()).backward()
    uses: list[Callable[[], Any]] = [
        lambda: logits.sum(),
        lambda: logits.detach().argmax(-1),
        lambda: flat(logits, labels()),
    ]
    other = logits_from_shard(
        own_columns(_weight(2, ROWS, SIZE), layout) * 1, layout, world_group()
    )
    view = other.view(-1, SIZE)
    other[..., 0] = 5.0
    uses.append(lambda: flat(view, labels()))
    said = []
    for use in uses:
        try:
            said.append(str(use()))
        except RuntimeError as error:
            said.append(str(error))
    return said


def used_in_time() -> tuple[bool, int]:
    """Logits that were used before the backward are at hand after it, gathered once."""
    layout = layout_of(even_widths(SIZE))
    full = _weight(2, ROWS, SIZE)
    logits = logits_from_shard(own_columns(full, layout) * 1, layout, world_group())
    with recorded_collectives() as calls:
        loss = flat(logits, labels())
        with torch.no_grad():
            before = logits.argmax(-1)
        loss.backward()
        after = logits.detach().argmax(-1)
    return torch.equal(before, after) and torch.equal(after, full.argmax(-1)), len(calls)
