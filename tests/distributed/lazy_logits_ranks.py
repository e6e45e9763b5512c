# SPDX-License-Identifier: Apache-2.0
"""What a training script may do with the logits of a step whose loss is formed from shards."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepspeed_autotp.vocab_parallel.lazy_logits import LazyLogits, Step
from tests.support.column_shards import (
    even_widths,
    forward_context,
    layout_of,
    own_columns,
    world_group,
)
from tests.support.output_head_models import batch, build, gradient_difference, shard
from tests.support.recorded_collectives import recorded_collectives

Use = Callable[[Any, Tensor], Tensor]
ROWS, SIZE = 5, 13


def labels() -> Tensor:
    drawn = torch.randint(0, SIZE, (2, ROWS), generator=torch.Generator().manual_seed(3))
    drawn[0, 1] = -100
    return drawn


def weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def lazy(shard: Tensor | None = None, *, soft_cap: float = 0.0) -> Any:
    """Logits over all ranks, as a model returns them."""
    layout, step = layout_of(even_widths(SIZE)), Step()
    own = own_columns(weight(2, ROWS, SIZE), layout) if shard is None else shard
    found: Any = LazyLogits(own * 1, layout, world_group(), step=step)
    if soft_cap:
        found = torch.tanh(found / soft_cap) * soft_cap
    step.is_running = False
    return found


def flat(x: Any, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(x.view(-1, x.size(-1)), y.view(-1), **options)


def changed_in_place(x: Any, y: Tensor) -> Tensor:
    x[..., 2] = -7.0
    x += 1
    return flat(x, y)


def seen_before(x: Any, y: Tensor) -> Tensor:
    with torch.no_grad():
        assert x.argmax(-1).shape == (2, ROWS)
    with torch.inference_mode():
        assert (x * 2).shape == (2, ROWS, SIZE)
    return flat(x, y) + x.square().sum()


def teacher(x: Any, y: Tensor) -> Tensor:
    assert not x.detach().requires_grad and x.requires_grad
    return (x.detach() * x).sum()


def checkpointed(x: Any, y: Tensor) -> Tensor:
    found: Tensor = checkpoint(flat, x, y, use_reentrant=False)
    return found


USES: dict[str, Use] = {
    "mean": flat,
    "shifted": lambda x, y: F.cross_entropy(
        x[..., :-1, :].contiguous().view(-1, SIZE), y[..., 1:].reshape(-1)
    ),
    "selected": lambda x, y: F.cross_entropy(x[y != -100], y[y != -100]),
    "smoothed": lambda x, y: flat(x, y, label_smoothing=0.1),
    "module": lambda x, y: nn.CrossEntropyLoss()(x.view(-1, SIZE), y.view(-1)),
    "reflected": lambda x, y: flat(1.5 + 2.0 * x, y) + flat(1 - x, y) * 0.5,
    "two of them": lambda x, y: flat(x * x - 2 * x, y) + (x - x.detach()).sum(),
    "constant": lambda x, y: flat(weight(SIZE) + x, y) + flat(x + weight(SIZE), y),
    "logsumexp": lambda x, y: x.logsumexp(-1).square().mean() + torch.logsumexp(x, -1).sum(),
    "log softmax": lambda x, y: F.nll_loss(F.log_softmax(x.view(-1, SIZE), -1), y.view(-1)),
    "matmul": lambda x, y: (x @ weight(SIZE, 3)).square().sum(),
    "in a list": lambda x, y: torch.cat([x, x * 2]).square().sum() + torch.stack([x, x]).sum(),
    "largest": lambda x, y: x.max(-1).values.sum() + x.topk(2).values.sum(),
    "where": lambda x, y: flat(torch.where(weight(SIZE) > 0.5, -50.0, x), y),
    "unbound": lambda x, y: sum((row.square().sum() for row in x), torch.zeros(())),
    "compared": lambda x, y: (x * (x > 0)).sum() + x[x != 0].sum(),
    "parameter": lambda x, y: flat(x * torch.ones(1, dtype=x.dtype, requires_grad=True), y),
    "transposed": lambda x, y: F.cross_entropy(x.transpose(1, 2), y) + x.mT.square().sum(),
    "negated": lambda x, y: flat(-x, y) + abs(x).sum() + (x**2).mean() + (2.0**x).mean(),
    "divided": lambda x, y: flat(x / 3, y) + (1 / (x * x + 1)).sum(),
    "einsum": lambda x, y: torch.einsum("bth,h->bt", x, weight(SIZE)).square().sum(),
    "changed in place": changed_in_place,
    "seen before": seen_before,
    "teacher": teacher,
    "checkpointed": checkpointed,
}  # fmt: skip


def compare(soft_cap: float) -> dict[str, float]:
    """By use: the larger error of value and gradient against the full logits."""
    found = {}
    layout = layout_of(even_widths(SIZE))
    for name, use in USES.items():
        full = weight(2, ROWS, SIZE).requires_grad_()
        plain = torch.tanh(full / soft_cap) * soft_cap if soft_cap else full * 1
        expected = use(plain, labels())
        expected.backward()
        assert full.grad is not None
        own = own_columns(full, layout)
        got = use(lazy(own, soft_cap=soft_cap), labels())
        got.backward()
        assert own.grad is not None
        apart = (own.grad - own_columns(full.grad, layout, leaf=False)).abs().max()
        found[name] = max(abs(float(got.detach() - expected.detach())), float(apart))
    return found


def ways_out() -> dict[str, bool]:
    """Whether what leaves torch's functions holds the full logits."""
    full = weight(2, ROWS, SIZE)
    stored = io.BytesIO()
    with torch.no_grad():
        torch.save(lazy(), stored)
        stored.seek(0)
        return {
            "numpy": bool((lazy().detach().numpy() == full.numpy()).all()),
            "array": bool((numpy.asarray(lazy().detach()) == full.numpy()).all()),
            "list": lazy().tolist() == full.tolist(),
            "item": lazy()[1, 2, 3].item() == full[1, 2, 3].item(),
            "number": float(lazy()[:1, :1, 0]) == float(full[0, 0, 0]),
            "pickle": torch.equal(pickle.loads(pickle.dumps(lazy())), full),
            "save": torch.equal(torch.load(stored), full),
            "copy": torch.equal(copy.copy(lazy()), full),
            "iteration": torch.equal(torch.stack(list(lazy())), full),
            "dlpack": torch.equal(torch.from_dlpack(lazy().detach()), full),
            "device": torch.equal(lazy().to("cpu", torch.float32), full.float()),
            "plain": type(lazy().full()) is Tensor and type(lazy() + 0) is Tensor,
        }


def facts() -> dict[str, bool]:
    """What is asked of logits without their values, and what passes them by."""
    from accelerate.utils import convert_to_fp32
    from torch.utils._pytree import tree_map_only

    x = lazy()
    outputs = {"loss": torch.ones((), dtype=torch.bfloat16), "logits": x}
    with recorded_collectives() as calls:
        found = {
            "shape": x.shape == (2, ROWS, SIZE) and x.size(-1) == SIZE and x.size() == x.shape,
            "dims": x.dim() == x.ndim == 3 and len(x) == 2,
            "type": x.dtype == torch.float64 and x.device.type == "cpu" and x.requires_grad,
            "said": repr(x) == str(x) == f"{x}" and repr(x).endswith("gathered when used)"),
            "unknown": not hasattr(x, "ds_id") and not hasattr(x, "keys"),
            "hashable": x in {x},
            "pytree": tree_map_only(Tensor, torch.sum, outputs)["logits"] is x,
            "accelerate": convert_to_fp32(outputs)["logits"] is x,
        }
    return {**found, "gathers nothing": not calls}


def one_rank() -> list[str]:
    """What one rank alone may print without waiting for the others."""
    x = lazy()
    return [repr(x), str(x), f"{x}"] if dist.get_rank() == 0 else []


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * x * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def _said(use: Callable[[], Any]) -> str:
    try:
        return f"no error, but {use()}"
    except (RuntimeError, AttributeError, TypeError) as error:
        return str(error)


def refused() -> dict[str, str]:
    """The errors of uses that would silently have no gradient, or another one."""
    x = lazy()
    loss = flat(x, labels())

    def assign() -> None:
        x.grad = None  # type: ignore[misc]

    return {
        "retain_grad": _said(lambda: x.retain_grad()),
        "register_hook": _said(lambda: x.register_hook(print)),
        "read": _said(lambda: x.grad),
        "assigned": _said(assign),
        "autograd.grad": _said(lambda: torch.autograd.grad(loss, x)),
        "in a list": _said(lambda: torch.autograd.grad([loss], [x])),
        "function": _said(lambda: _Cube.apply(x)),
        "reentrant": _said(lambda: checkpoint(flat, x, labels(), use_reentrant=True)),
        "inputs": _said(lambda: loss.backward(inputs=[x])),
    }


def too_late(family: str) -> list[str]:
    """Logits of a model that are used first after the backward."""
    model = shard(build(family, tied=False), family)
    outputs = model(**batch())
    outputs.loss.backward()
    uses: list[Callable[[], Any]] = [
        lambda: outputs.logits.sum(),
        lambda: outputs.logits.detach(),
        lambda: F.softmax(outputs["logits"], -1),
        lambda: outputs[1][0],
    ]
    return [_said(use) for use in uses]


def used_in_time(family: str) -> dict[str, bool]:
    """Logits that were used before the backward are there after it, and gathered once; a retained
    graph keeps them."""
    unsharded, model = build(family, tied=False), shard(build(family, tied=False), family)
    for _ in range(2):  # which compare the batches and the last steps of the ranks
        model(**batch())
    with recorded_collectives() as calls:
        outputs = model(**batch())
        gathers = [name for name, _ in calls]
        with torch.no_grad():
            before = outputs.logits.argmax(-1)
        outputs.loss.backward(retain_graph=True)
        outputs.loss.backward()
        after = outputs.logits.detach()
    assert not gathers
    expected = unsharded(**batch())
    (2 * expected.loss).backward()
    retained = model(**batch())
    retained.loss.backward(retain_graph=True)
    late = retained.logits.detach()
    return {
        "before": torch.equal(before, expected.logits.argmax(-1)),
        "after": torch.allclose(after, expected.logits.detach(), atol=1e-5),
        "retained": torch.allclose(late, expected.logits.detach(), atol=1e-5),
        "one gather": [name for name, _ in calls].count("all-gather") == 2,
    }


def copied() -> dict[str, float]:
    """Losses and gradients of a deep copy of a sharded model, whose own state it must use."""
    unsharded, model = build("gemma2", tied=False), shard(build("gemma2", tied=False), "gemma2")
    twin = copy.deepcopy(model)
    expected = unsharded(**batch()).loss
    expected.backward()
    found = {}
    for name, one in (("copy", twin), ("original", model)):
        outputs = one(**batch())
        outputs.loss.backward()
        assert type(outputs.logits) is LazyLogits
        assert one.config.final_logit_softcapping == 2.0
        found[name] = abs(float(outputs.loss.detach() / expected.detach()) - 1)
    found["gradients"] = gradient_difference(model, unsharded)
    return found


def replaced_loss() -> dict[str, bool]:
    """A loss function that the user sets after sharding is given full logits."""
    model: Any = shard(build("llama", tied=False), "llama")
    seen = []

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **more: Any) -> Tensor:
        seen.append(type(logits) is Tensor and logits.shape[-1] == vocab_size)
        return logits.square().mean()

    model.loss_function = loss
    outputs = model(**batch())
    return {"full": seen == [True], "logits": type(outputs.logits) is Tensor}


def through_wrappers() -> dict[str, bool]:
    """A model whose forward Accelerate wraps for mixed precision, and DDP."""
    from accelerate.utils import convert_outputs_to_fp32

    model: Any = shard(build("gemma2", tied=False), "gemma2")
    expected = float(model(**batch()).loss.detach())
    wrapped: Any = convert_outputs_to_fp32(model.forward)
    model.forward = wrapped
    outputs = model(**batch())
    alone = dist.new_subgroups(group_size=1)[0]
    parallel = nn.parallel.DistributedDataParallel(
        model, process_group=alone, find_unused_parameters=True
    )
    reduced = parallel(**batch())
    reduced.loss.backward()
    return {
        "fp32": float(outputs.loss.detach()) == expected and type(outputs.logits) is LazyLogits,
        "ddp": float(reduced.loss.detach()) == expected and type(reduced.logits) is LazyLogits,
    }


def undone() -> dict[str, bool]:
    """What a model has once the sharded logits are switched off again."""
    from deepspeed_autotp.interop.loss_function import shifts_labels
    from deepspeed_autotp.interop.module_state import set_state
    from deepspeed_autotp.layers.layer_sharding import LayerSharding, sharding_of
    from deepspeed_autotp.vocab_parallel.output_head import keep_logits_sharded

    model: Any = build("llama", tied=False)
    before, loss = dict(vars(model)), model.loss_function
    group = world_group()
    layout = layout_of(even_widths(model.config.vocab_size))
    made = LayerSharding(
        group=group, context=forward_context(group), layout=layout, gather_output=True
    )
    set_state(model.lm_head, made)
    undo: list[Callable[[], None]] = []
    keep_logits_sharded(model, model.lm_head, undo)
    changed = "forward" in vars(model) and model.loss_function != loss
    while undo:
        undo.pop()()
    return {
        "changed": changed,
        "forward": dict(vars(model)) == before,
        "loss": model.loss_function is loss,
        "sharding": sharding_of(model.lm_head) is made,
        "known": shifts_labels(model) is True,
    }
