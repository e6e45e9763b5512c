# SPDX-License-Identifier: Apache-2.0
"""Losses that are formed with the output head, a chunk of tokens at a time."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deepspeed_autotp
from deepspeed_autotp.distributed.autograd_collectives import copy_to_tp_region
from deepspeed_autotp.vocab_parallel.cross_entropy import loss_task
from deepspeed_autotp.vocab_parallel.fused_loss import Factor, FusedTask, fused_cross_entropy
from deepspeed_autotp.vocab_parallel.head_product import HeadProduct, sample_of
from deepspeed_autotp.vocab_parallel.lazy_logits import LazyLogits
from tests.support.column_shards import layout_of, world_group
from tests.support.engine_config import Setting, engine_config
from tests.support.log_records import logged_warnings
from tests.support.loss_chunks import loss_chunks
from tests.support.loss_curves import RATE, own_rows
from tests.support.output_head_models import (
    VOCABULARY,
    batch,
    build,
    gradient_difference,
    section,
    shard,
)
from tests.support.recorded_collectives import recorded_collectives
from tests.support.small_models import tokens

# Of 48 tokens in a batch, so that the last chunk is a shorter one.
CHUNK = 7
TOKENS, HIDDEN = 11, 6
FACTORS: dict[str, tuple[Factor, ...]] = {
    "": (),
    "scaled": ((Tensor.mul, (0.7,)),),
    "divided": ((Tensor.float, ()), (Tensor.div, (3.0,)), (Tensor.mul, (2.0,))),
}


def _drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def against_cross_entropy(
    widths: list[int], factors: str, cap: float, bias: bool
) -> dict[str, float]:
    """Differences of loss and gradients, in float64, from all logits and F.cross_entropy; those of
    a retained graph, too."""
    layout, group = layout_of(widths), world_group()
    # A float64 has no use for casts to float32.
    steps = tuple(step for step in FACTORS[factors] if step[0] is not Tensor.float)
    x, w = _drawn(TOKENS, HIDDEN, seed=1), _drawn(layout.size, HIDDEN, seed=2)
    b = _drawn(layout.size, seed=3) if bias else None
    drawn = torch.Generator().manual_seed(4)
    labels = torch.randint(0, layout.size, (TOKENS,), generator=drawn)
    labels[::3] = -100
    full = [None if p is None else p.clone().requires_grad_() for p in (x, w, b)]
    logits = F.linear(*full)  # type: ignore[arg-type]
    for function, numbers in steps:
        logits = function(logits, *numbers)
    logits = torch.tanh(logits / cap) * cap if cap else logits
    expected = F.cross_entropy(logits, labels, reduction="sum") / 5
    (expected * 3).backward()

    start, width = layout.runs[group.rank]
    own = [
        None if p is None else p.clone().requires_grad_()
        for p in (x, w[start : start + width], None if b is None else b[start : start + width])
    ]
    assert own[0] is not None and own[1] is not None
    product = HeadProduct(
        *(copy_to_tp_region(own[0], group), own[1], own[2]),
        dtype=torch.float64,
        tokens=3,
        sample=sample_of(own[1]),
    )
    task = loss_task(layout, group, ignore_index=-100, soft_cap=cap)
    over: list[bool] = []
    loss = fused_cross_entropy(
        product, labels, 5, FusedTask(task, steps, lambda: over.append(True))
    )
    (loss * 3).backward(retain_graph=True)
    assert not over
    first = [None if p is None or p.grad is None else p.grad.clone() for p in own]
    (loss * 3).backward()
    assert over
    found = {"loss": abs(float((loss - expected).detach()))}
    for name, f, p, once in zip("xwb", full, own, first, strict=True):
        if f is None or p is None or once is None:
            continue
        assert f.grad is not None and p.grad is not None
        right = f.grad if name == "x" else f.grad[start : start + width]
        found[name] = float((once - right).norm() + (p.grad - 2 * right).norm())
    return found


def against_one_process(
    family: str, tied: bool, more: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any]:
    """A step of a model in one process, and over the ranks, where logits of all tokens are never
    formed; ``more`` goes to the forward, ``config`` is that of the sharding."""
    inputs: dict[str, Any] = {**batch(), **more}
    unsharded, model = build(family, tied=tied), shard(build(family, tied=tied), family, **config)
    expected = unsharded(**inputs).loss
    expected.backward()
    with loss_chunks(CHUNK) as seen, recorded_collectives() as calls:
        outputs = model(**inputs)
        outputs.loss.backward()
    chunks = _chunks(inputs["labels"].numel())
    kinds = [name for name, size in calls if size == 3 * 4 * CHUNK]
    return {
        "loss": abs(float((outputs.loss / expected).detach()) - 1),
        "gradients": gradient_difference(model, unsharded),
        "chunks": seen == chunks and kinds == ["all-gather"] * (len(chunks) - 1),
        "lazy": type(outputs.logits) is LazyLogits,
    }


def _chunks(count: int) -> list[int]:
    return [min(CHUNK, count - first) for first in range(0, count, CHUNK)]


def self_checked(family: str) -> dict[str, Any]:
    """A self-check of the model itself whose loss is fused: what it warns of, and a step."""
    unsharded, model = build(family, tied=False), build(family, tied=False)
    with loss_chunks(2) as seen, logged_warnings() as warnings:
        shard(model, family, self_check=True)
    expected = unsharded(**batch()).loss
    expected.backward()
    loss = model(**batch()).loss
    loss.backward()
    return {
        "loss": abs(float((loss / expected).detach()) - 1),
        "gradients": gradient_difference(model, unsharded),
        "chunks": 2 in seen and not warnings,
    }


def logits_are_read(family: str) -> dict[str, Any]:
    """Logits beside a fused loss: before its backward, with a gradient of their own, after a
    retained backward, and too late."""
    inputs = batch()
    unsharded, model = build(family, tied=True), shard(build(family, tied=True), family)
    expected = unsharded(**inputs)
    term = 0.01 * expected.logits.logsumexp(-1).square().mean()
    (expected.loss + term).backward()
    with loss_chunks(CHUNK) as seen:
        outputs = model(**inputs)
        shape = outputs.logits.shape == expected.logits.shape
        with torch.no_grad():
            same = torch.equal(outputs.logits.argmax(-1), expected.logits.argmax(-1))
        (outputs.loss + 0.01 * outputs.logits.logsumexp(-1).square().mean()).backward()
        gradients = gradient_difference(model, unsharded)
        retained, late, changed, written = (model(**inputs) for _ in range(4))
        retained.loss.backward(retain_graph=True)
        kept = torch.allclose(retained.logits.detach(), expected.logits.detach(), atol=1e-5)
        late.loss.backward()
        said = [_said(lambda: late.logits.sum())]
        for parameter in model.parameters():
            parameter.data.add_(0.1)  # as DeepSpeed writes
        said.append(_said(lambda: written.logits.sum()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1)
        said.append(_said(lambda: changed.logits.sum()))
    return {
        "shape": shape,
        "values": same,
        "gradients": gradients < 1e-5,
        "retained": kept,
        "fused": seen == _chunks(inputs["labels"].numel()) * 5,
        "late": said,
    }


def _said(use: Callable[[], Any]) -> str:
    try:
        return f"no error, but {use()}"
    except RuntimeError as error:
        return str(error)


def accumulated(zero: int, reads: bool) -> dict[str, Any]:
    """Steps of two micro-batches through DeepSpeed, with clipping."""
    expected = []
    unsharded = build("gemma2", tied=True)
    optimizer = torch.optim.SGD(unsharded.parameters(), lr=RATE)
    for step in range(3):
        for part in (0, 1):
            ids = tokens(2 * step + part, vocabulary=VOCABULARY)
            loss = unsharded(input_ids=ids, labels=ids).loss / 2
            loss.backward()
            expected.append(float(loss.detach()))
        nn.utils.clip_grad_norm_(unsharded.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model = build("gemma2", tied=True)
    config = engine_config(Setting(tp=2, zero=zero, clip=1.0))
    del config["train_batch_size"]
    engine, *_ = deepspeed_autotp.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        config={**config, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
    )
    losses = []
    with loss_chunks(CHUNK) as seen:
        for part in range(6):
            ids = own_rows(tokens(part, vocabulary=VOCABULARY), tp=2)
            outputs = engine(input_ids=ids, labels=ids)
            if reads:
                assert outputs.logits.argmax(-1).shape == ids.shape
            engine.backward(outputs.loss)
            engine.step()
            total = outputs.loss.detach().clone()
            dist.all_reduce(total)
            losses.append(float(total) / dist.get_world_size() / 2)
    engine.destroy()
    return {
        "worst": max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)),
        "fused": max(seen) == CHUNK,
    }


def frozen(part: str) -> dict[str, Any]:
    """A step in which the head does not train, or all but the head."""
    unsharded, model = build("llama", tied=False), build("llama", tied=False)
    for one in (unsharded, model):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(("lm_head" in name) != (part == "head"))
    shard(model, "llama")
    expected = unsharded(**batch()).loss
    expected.backward()
    with loss_chunks(CHUNK) as seen:
        loss = model(**batch()).loss
        loss.backward()
    return {
        "loss": abs(float((loss / expected).detach()) - 1),
        "gradients": gradient_difference(model, unsharded),
        "chunks": max(seen) == CHUNK,
    }


def checkpointed(reentrant: bool) -> dict[str, Any]:
    """A step within one checkpoint of the whole model."""
    unsharded, model = build("llama", tied=False), shard(build("llama", tied=False), "llama")
    expected = unsharded(**batch()).loss
    expected.backward()

    def forward(anchor: Tensor) -> Tensor:
        found: Tensor = model(**batch()).loss * anchor
        return found

    with loss_chunks(CHUNK) as seen:
        one = torch.ones((), requires_grad=True)
        loss = checkpoint(forward, one, use_reentrant=reentrant)
        loss.backward()
    return {
        "loss": abs(float((loss / expected).detach()) - 1),
        "gradients": gradient_difference(model, unsharded),
        # Without gradients the logits of all tokens are formed, and freed.
        "chunks": seen == ([48] if reentrant else _chunks(48)) + _chunks(48),
    }


def rounded(kind: str) -> dict[str, Any]:
    """bfloat16 of a loss that is fused, and of one that is not: how far each is from float32."""
    # So many that their logits take more than the gradient of the weight in float32.
    ids = tokens(0, length=24, vocabulary=VOCABULARY)
    exact = build("granite", tied=False)
    exact(input_ids=ids, labels=ids).loss.backward()
    apart: dict[str, float] = {}
    for name, size in (("fused", CHUNK), ("not", 1000)):
        model = build("granite", tied=False)
        model = shard(model if kind == "autocast" else model.bfloat16(), "granite")
        with (
            loss_chunks(size) as seen,
            torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"),
        ):
            outputs = model(input_ids=ids, labels=ids)
        outputs.loss.backward()
        apart[name] = gradient_difference(model, exact)
        apart[f"{name} chunk"] = max(seen)
        assert outputs.loss.dtype == torch.float32
        assert outputs.logits.dtype == torch.bfloat16
    return apart


def whole_logits(kind: str) -> list[int]:
    """Tokens of the logits that a loss is formed of where it is not fused."""
    model = build("llama", tied=False)
    if kind == "float16":
        model = model.half()
    shard(model, "llama", self_check=False)
    if kind == "hook":
        model.lm_head.register_forward_hook(lambda *args: None)
    with loss_chunks(48 if kind == "few tokens" else CHUNK) as seen:
        outputs = model(**batch())
        outputs.loss.backward()
    return seen


def in_parallel(way: str) -> dict[str, Any]:
    """Two replicas of TP 2, by DDP or fully_shard, whose gradients are averages."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    unsharded, model = (build("llama", tied=way != "head") for _ in range(2))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    deepspeed_autotp.parallelize(model, mesh=mesh["tp"], config=section("llama"))
    wrapped: Any = model
    if way == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group("dp"))
    else:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        if way == "head":
            fully_shard([model.model.norm, model.lm_head], mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"], reshard_after_forward=way == "resharded")
    expected, losses = [], []
    single = torch.optim.SGD(unsharded.parameters(), lr=RATE)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=RATE)
    with loss_chunks(CHUNK) as seen:
        for step in range(3):
            ids = tokens(step, vocabulary=VOCABULARY)
            loss = unsharded(input_ids=ids, labels=ids).loss
            loss.backward()
            expected.append(float(loss.detach()))
            single.step()
            single.zero_grad()
            own = own_rows(ids, tp=2)
            outputs = wrapped(input_ids=own, labels=own)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total = outputs.loss.detach().clone()
            dist.all_reduce(total)
            losses.append(float(total) / dist.get_world_size())
    return {
        "worst": max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)),
        "chunk": max(seen, default=0),
    }
