# SPDX-License-Identifier: Apache-2.0
"""Losses that multiply by the output head's weight themselves."""

import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deepspeed_autotp
from deepspeed_autotp.interop.module_state import set_state
from deepspeed_autotp.layers.layer_sharding import sharding_of
from deepspeed_autotp.vocab_parallel.gathered_weight import reading_shard
from tests.support.engine_config import Setting, engine_config
from tests.support.loss_curves import RATE
from tests.support.output_head_models import batch, build, gradient_difference, shard
from tests.support.raised_error import raised_error
from tests.support.recorded_collectives import recorded_collectives


class _Losses(torch.autograd.Function):
    """Cross-entropy of x w' + b and labels, which never has the logits of all tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, b, labels)
        rows = zip(x.split(5), labels.split(5), strict=True)
        losses = [F.cross_entropy(F.linear(a, w, b), of, reduction="none") for a, of in rows]
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, w, b, labels = ctx.saved_tensors
        d = torch.softmax(F.linear(x, w, b), dim=-1)
        d[torch.arange(len(labels)), labels] -= 1
        d *= dy.unsqueeze(1)
        return d @ w, d.T @ x, None if b is None else d.sum(0), None


def _fused(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
    """As TRL: the weight is looked up in each call and asked for its device and data type."""
    assert labels is not None
    head = self.get_output_embeddings()
    hidden = self.base_model(input_ids).last_hidden_state[:, :-1].to(head.weight.dtype)
    told = labels[:, 1:].to(head.weight.device)
    learnt = told != -100
    return _Losses.apply(hidden[learnt], head.weight, head.bias, told[learnt]).mean()


def _plain(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
    """The same with torch's own functions."""
    assert labels is not None
    head = self.get_output_embeddings()
    hidden = self.base_model(input_ids).last_hidden_state[:, :-1]
    logits = torch.matmul(hidden, head.weight.t())
    if head.bias is not None:
        logits = logits + head.bias
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def _chunked(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
    """The loss of each row in a checkpoint, where the weight is read, after a call of its own."""
    assert labels is not None
    head = self.get_output_embeddings()

    def loss_of(x: Tensor, told: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, head.weight, head.bias), told, reduction="sum")

    if self.nested:
        self.nested = False
        with torch.no_grad():
            self(input_ids, labels)
        self.nested = True
    hidden = self.base_model(input_ids).last_hidden_state[:, :-1]
    losses = [
        checkpoint(loss_of, x, told, use_reentrant=self.reentrant)
        for x, told in zip(hidden, labels[:, 1:], strict=True)
    ]
    total: Tensor = torch.stack(losses).sum()
    return total / (labels[:, 1:] != -100).sum()


def _asks(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
    """As mamba: the head is called, and its weight has the dtype to cast to."""
    head = self.get_output_embeddings()
    assert head.weight.shape[0] == self.config.vocab_size
    hidden = self.base_model(input_ids).last_hidden_state
    return head(hidden.to(head.weight.dtype))


_FORWARDS = {
    "fused": _fused,
    "plain": _plain,
    "asks": _asks,
    "checkpoint": _chunked,
    "reentrant": _chunked,
}


def model_with(forward: str, *, tied: bool, bias: bool, layers: int = 2) -> Any:
    """A Llama whose forward was replaced, as TRL replaces it."""
    model: Any = build("llama", tied=tied, num_hidden_layers=layers)
    if bias:
        drawn = torch.randn(model.config.vocab_size, generator=torch.Generator().manual_seed(1))
        model.lm_head.bias = nn.Parameter(drawn)
    model.nested, model.reentrant = True, forward == "reentrant"
    model.forward = types.MethodType(_FORWARDS[forward], model)
    return model


def against_one_process(forward: str, tied: bool, bias: bool) -> tuple[float, float]:
    """How far loss and gradients of a step are from those of one process."""
    unsharded = model_with(forward, tied=tied, bias=bias)
    model = shard(model_with(forward, tied=tied, bias=bias), "llama")
    losses = [one(**batch()) for one in (unsharded, model)]
    for loss in losses:
        loss.backward()
    return abs(float(losses[1].detach() / losses[0].detach()) - 1), gradient_difference(
        model, unsharded
    )


def compiled() -> tuple[float, float, int]:
    """As above under torch.compile, and how often a graph was broken."""
    from torch._dynamo.utils import counters

    unsharded = model_with("plain", tied=False, bias=True, layers=1)
    model = shard(model_with("plain", tied=False, bias=True, layers=1), "llama")
    torch._dynamo.reset()
    counters.clear()
    try:
        expected, loss = unsharded(**batch()), torch.compile(model, backend="aot_eager")(**batch())
        expected.backward()
        loss.backward()
        breaks = sum(counters["graph_break"].values())
        return (
            abs(float(loss.detach() / expected.detach()) - 1),
            gradient_difference(model, unsharded),
            breaks,
        )
    finally:
        torch._dynamo.reset()


def asked() -> dict[str, Any]:
    """What shape and data type of the weight cost, and what is read outside of the forward."""
    model: Any = shard(model_with("asks", tied=False, bias=False), "llama")
    head = model.lm_head
    with torch.no_grad():
        for _ in range(2):  # which compare the batches and the last steps of the ranks
            model(**batch())
        with recorded_collectives() as calls:
            logits = model(**batch())
    return {
        "gathers": [name for name, _ in calls].count("all-gather"),
        "full": logits.shape[-1] == model.config.vocab_size,
        "shard": head.weight is dict(model.named_parameters())["lm_head.weight"],
        "printed": "Gathered" not in repr(head.weight),
    }


def gathers_of_a_step() -> int:
    """How often the weight is gathered by a loss that reads it for each row."""
    model: Any = shard(model_with("checkpoint", tied=False, bias=False), "llama")
    model.nested = False
    for _ in range(2):  # which compare the batches and the last steps of the ranks
        model(**batch())
    with recorded_collectives() as calls:
        model(**batch())
    return [kind for kind, _ in calls].count("all-gather")


def _address(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> bool:
    """As a kernel that is no operation of torch."""
    weight = self.get_output_embeddings().weight
    self.base_model(input_ids)
    return weight.data_ptr() == weight.full().data_ptr() != 0


def address() -> bool:
    model: Any = build("llama", tied=False)
    shard(model, "llama")
    model.forward = types.MethodType(_address, model)
    found: bool = model(**batch())
    return found


def interrupted(kind: str) -> dict[str, bool]:
    """What the weight reads as, and the next step, once a forward was ended by no Exception."""
    errors: dict[str, type[BaseException]] = {"interrupt": KeyboardInterrupt, "exit": SystemExit}
    unsharded = model_with("plain", tied=False, bias=False)
    model: Any = shard(model_with("plain", tied=False, bias=False), "llama")

    def interrupt(module: nn.Module, args: object) -> None:
        raise errors[kind]

    hook = model.model.norm.register_forward_pre_hook(interrupt)
    context, ended = sharding_of(model.lm_head).context, False
    try:
        model(**batch())
    except errors[kind]:
        ended = not context.is_in_forward
    hook.remove()
    shard_of_weight = model.lm_head.weight is dict(model.named_parameters())["lm_head.weight"]
    losses = [one(**batch()) for one in (unsharded, model)]
    for loss in losses:
        loss.backward()
    return {
        "ended": ended and not context.is_in_forward and not context.gathered,
        "shard": shard_of_weight,
        "loss": abs(float(losses[1].detach() / losses[0].detach()) - 1) < 1e-6,
        "gradients": gradient_difference(model, unsharded) < 1e-5,
    }


def peculiar() -> list[str]:
    """The errors of a weight that is gone, and of one that cannot be gathered."""
    model: Any = shard(model_with("plain", tied=False, bias=False), "llama")
    said = []
    sharding = replace(sharding_of(model.lm_head), layout=None)
    set_state(model.lm_head, sharding)
    for spoil in (lambda: None, lambda: delattr(model.lm_head, "weight")):
        spoil()
        try:
            model(**batch())
        except (RuntimeError, AttributeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def read_after_a_forward() -> list[list[bool]]:
    """Whether ``reading_shard`` still reads the shard once the layer has run within it, and whether
    the full weight is read behind it."""
    model: Any = shard(model_with("plain", tied=False, bias=False), "llama")
    head, size, found = model.lm_head, model.config.vocab_size, []

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        with reading_shard(head):
            head(output.last_hidden_state)
            inside = head.weight.shape[0]
        found.append([inside < size, head.weight.shape[0] == size])

    model.base_model.register_forward_hook(look)
    model(**batch())
    return found


def trl_head(family: str, tied: bool) -> dict[str, Any]:
    """A step with TRL's fused head, imported before or after sharding, and what it gathers."""
    models: list[Any] = [build(family, tied=tied) for _ in range(2)]
    shard(models[1], family)
    from trl.trainer.utils import add_fused_lm_head

    found = []
    for model in models:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        with recorded_collectives() as calls:
            outputs = model(**batch(), fused_lm_head=True)
            loss = outputs.loss - 0.1 * outputs.entropy.mean()
            loss.backward()
        found.append((float(loss.detach()), outputs))
    (expected, theirs), (loss, ours) = found
    return {
        "loss": abs(loss / expected - 1),
        "gradients": gradient_difference(models[1], models[0]),
        "top1": torch.equal(theirs.is_top1, ours.is_top1),
        "entropy": float((theirs.entropy - ours.entropy).detach().abs().max()),
        "gathers": [size for kind, size in calls if kind == "all-gather"],
        "tokens": ours.log_probs.numel(),
    }


def with_engine(zero: int) -> float:
    """The worst relative difference of three losses to those of one process."""
    unsharded, model = (model_with("fused", tied=False, bias=False) for _ in range(2))
    optimizer = torch.optim.SGD(unsharded.parameters(), lr=RATE)
    config = engine_config(Setting(tp=dist.get_world_size(), zero=zero, clip=0.0))
    # ZeRO 3 partitions every weight, however small.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine, *_ = deepspeed_autotp.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        config=config,
    )
    worst = 0.0
    for _ in range(3):
        expected, loss = unsharded(**batch()), engine(**batch())
        worst = max(worst, abs(float(loss.detach() / expected.detach()) - 1))
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.backward(loss)
        engine.step()
    return worst


def written() -> list[str]:
    """What writing to the weight in the forward of the model says."""
    model: Any = shard(build("llama", tied=False), "llama")
    head = model.lm_head

    def assign(weight: Any) -> None:
        weight.data = weight.data * 0.5

    def run(write: Callable[[Any], Any]) -> None:
        handle = head.register_forward_pre_hook(lambda module, _: write(module.weight))
        try:
            with torch.no_grad():
                model(**batch())
        finally:
            handle.remove()

    writes: list[Callable[[Any], Any]] = [
        lambda weight: weight.mul_(0.5),
        lambda weight: weight.data.mul_(0.5),
        lambda weight: torch.mul(weight, 0.5, out=weight),
        assign,
    ]
    return [raised_error(lambda write=write: run(write)) for write in writes]  # type: ignore[misc]
