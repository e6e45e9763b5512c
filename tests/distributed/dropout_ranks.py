# SPDX-License-Identifier: Apache-2.0
"""What the ranks do: dropout inside and outside of sharded regions."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deepspeed_autotp
from tests.support.dropout_model import (
    RATE,
    DropoutModel,
    Masks,
    SeenDropout,
    build_dropout_model,
    inputs,
    masks_of,
    shard,
)
from tests.support.raised_error import raised_error
from tests.support.replica_difference import replica_difference
from tests.support.small_models import build, tokens
from tests.support.training_loops import train_sharded


def sharded(
    heads: int, *, sequence: bool = False, reentrant: bool | None = None, rate: float = RATE
) -> DropoutModel:
    model = build_dropout_model(heads, rate=rate, reentrant=reentrant)
    shard(model, heads, sequence=sequence)
    return model


def step(model: nn.Module, heads: int, number: int = 0) -> Tensor:
    """Forward and backward; the loss."""
    loss: Tensor = model(inputs(heads, number)).square().mean()
    loss.backward()
    return loss.detach()


def masks(
    heads: int, sequence: bool, reentrant: bool | None, steps: int
) -> tuple[list[Masks], float]:
    """Masks of some steps; and a random number behind them."""
    model = sharded(heads, sequence=sequence, reentrant=reentrant)
    torch.manual_seed(11)
    found = []
    for number in range(steps):
        step(model, heads, number)
        found.append(masks_of(model))
    return found, float(torch.rand(()))


def gradients(heads: int, sequence: bool) -> list[tuple[float, list[Tensor], float]]:
    """Loss, gradients and a random number behind a step: without checkpoints, with re-entrant
    ones, and with others."""
    found = []
    for reentrant in (None, True, False):
        model = sharded(heads, sequence=sequence, reentrant=reentrant)
        torch.manual_seed(5)
        losses = [float(step(model, heads, number)) for number in range(2)]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((sum(losses), grads, float(torch.rand(()))))
    return found


def long_run(
    steps: int, heads: int, sequence: bool, reentrant: bool | None, compiled: bool
) -> tuple[str, float, list[float]]:
    """Steps with all dropouts: the check of the replicas, a random number, the losses."""
    model = sharded(heads, sequence=sequence, reentrant=reentrant)
    run: nn.Module = model
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    try:
        for number in range(steps):
            losses.append(float(step(run, heads, number)))
            optimizer.step()
            optimizer.zero_grad()
            masks_of(model)
    finally:
        if compiled:
            torch._dynamo.reset()
    return replica_difference(model), float(torch.rand(())), losses


def compiled_masks(heads: int) -> tuple[list[Tensor], Tensor, int]:
    """Of a compiled model in its first step, seen through its gradients: those of its values for
    each head, of its output's bias, and how often a graph was broken."""
    from torch._dynamo.utils import counters

    model = sharded(heads)
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(11)
    try:
        step(torch.compile(model, backend="aot_eager"), heads)
        breaks = sum(counters["graph_break"].values())
    finally:
        torch._dynamo.reset()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    torch.manual_seed(11)
    model.zero_grad()
    step(model, heads)
    again = [p.grad for p in model.parameters() if p.grad is not None]
    return [a - b for a, b in zip(grads.values(), again, strict=True)], torch.rand(()), breaks


def outputs(heads: int, seeds: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], float]:
    """Mean and variance over many seeds of attention, in one process and sharded, where all
    heads do the same; and the share of attention weights that were dropped."""
    whole = build_dropout_model(heads)
    attention = whole.blocks[0].attention
    attention.residual_dropout.p = 0.0
    with torch.no_grad():
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            layer.weight.copy_(layer.weight[:4].repeat(heads, 1))
            layer.bias.copy_(layer.bias[:4].repeat(heads))
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, :4].repeat(1, heads))
    torch.manual_seed(1)
    with torch.no_grad():
        x = inputs(heads, rows=1)
        alone = torch.stack([attention(x) for _ in range(seeds)])
        shard(whole, heads)
        masks_of(whole)
        together = torch.stack([attention(x) for _ in range(seeds)])
    seen = torch.stack(attention.attention_dropout.seen)
    dropped = float((seen == 0).double().mean())
    return (alone.mean(0), alone.var(0)), (together.mean(0), together.var(0)), dropped


class Interrupted(Exception):
    pass


def interrupted(heads: int, sequence: bool, where: str) -> tuple[float, list[Masks], float]:
    """A step fails at a dropout; random numbers behind it, masks of the next steps, and again."""
    model = sharded(heads, sequence=sequence)
    torch.manual_seed(4)

    def fail(module: nn.Module, args: object, output: object) -> None:
        raise Interrupted

    handle = model.get_submodule(where).register_forward_hook(fail)
    try:
        step(model, heads)
    except Interrupted:
        handle.remove()
    after = float(torch.rand(()))
    masks_of(model)
    found = []
    for number in range(2):
        step(model, heads, number)
        found.append(masks_of(model))
    return after, found, float(torch.rand(()))


def fails_in_recomputation(heads: int) -> tuple[float, list[Masks]]:
    """The backward fails within a region that is recomputed without its RNG state restored."""
    model = sharded(heads)
    block = model.blocks[0]
    torch.manual_seed(4)
    y = checkpoint(block, inputs(heads), use_reentrant=False, preserve_rng_state=False)

    def fail(module: nn.Module, args: object, output: object) -> None:
        raise Interrupted

    handle = block.mlp.inner_dropout.register_forward_hook(fail)
    try:
        y.square().mean().backward()
    except Interrupted:
        handle.remove()
    after = float(torch.rand(()))
    masks_of(model)
    step(model, heads)
    return after, [masks_of(model)]


class Literal(nn.Module):
    """A model of which nothing says that it drops, before its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_dropout_model(4, rate=0.0)
        for block in self.inner.blocks:
            block.mlp.inner_dropout.register_forward_hook(self._drop)
        self.seen: list[Tensor] = []
        self.is_on = True

    def _drop(self, module: nn.Module, args: object, y: Tensor) -> Tensor:
        if not (self.is_on and self.training):
            return y
        mask = F.dropout(torch.ones_like(y), 0.5)
        self.seen.append(mask)
        return y * mask

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


def undeclared(late: bool, checkpointed: bool) -> list[list[Tensor]]:
    """Masks of each step that has dropout, from the first one or from the second on."""
    model = Literal()
    if checkpointed:
        model.inner.checkpoint = functools.partial(checkpoint, use_reentrant=False)
    shard(model, 4)
    found = []
    for number in range(3):
        model.is_on = number > 0 or not late
        step(model, 4, number)
        if model.is_on:
            found.append(list(model.seen))
        model.seen.clear()
    return found


def nothing_drawn(heads: int) -> list[bool]:
    """Whether steps without dropout leave the RNG state alone, by step."""
    model = sharded(heads, rate=0.0)
    found = []
    for number in range(3):
        before = torch.get_rng_state()
        step(model, heads, number)
        found.append(torch.equal(before, torch.get_rng_state()))
    return found


def evaluated(heads: int) -> bool:
    """Whether evaluation leaves the RNG state of a model with dropout alone."""
    model = sharded(heads).eval()
    before = torch.get_rng_state()
    model(inputs(heads))
    return torch.equal(before, torch.get_rng_state())


def _seen(model: nn.Module, pick: Callable[[str], bool]) -> dict[str, list[Tensor]]:
    """The masks that dropouts of certain names draw from now on, where no input is 0."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, y: Tensor) -> None:
            found.setdefault(name, []).append((y != 0).detach())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and pick(name):
            module.register_forward_hook(keep(name))
    return found


def adapters(changes: dict[str, Any], sequence: bool) -> tuple[str, dict[str, list[Tensor]]]:
    """The check after training LoRA with dropout, and the masks of its dropouts."""
    from peft import LoraConfig, get_peft_model

    model = build(
        "llama", tied=False, attn_implementation="eager", attention_dropout=0.1, **changes
    )
    config = LoraConfig(
        r=5,
        lora_dropout=0.4,
        init_lora_weights=False,
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(3)
    model = get_peft_model(model, config)
    deepspeed_autotp.parallelize(
        model, tp_size=dist.get_world_size(), config={"sequence_parallel": sequence}
    )
    seen = _seen(model, lambda name: "lora_dropout" in name)
    train_sharded(model, steps=4)
    return replica_difference(model), {name: masks[:1] for name, masks in seen.items()}


def positions() -> tuple[str, list[Tensor], list[Tensor]]:
    """The check after training DeBERTa with dropout; masks of its positions and its heads."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deberta-v2",
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=64,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pad_token_id=0,
    )
    model = AutoModelForMaskedLM.from_config(config).train()
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    seen = _seen(model, lambda name: "attention.self" in name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(4):
        model(input_ids=tokens(number), labels=tokens(number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    attention = "deberta.encoder.layer.0.attention.self."
    return (
        replica_difference(model),
        seen[attention + "pos_dropout"][:1],
        seen[attention + "dropout"][:1],
    )


class ByParts(nn.Module):
    """Checkpoints a function that calls layers itself, not their module."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.inner = build_dropout_model(4, rate=rate)

    def _mlp(self, x: Tensor) -> Tensor:
        mlp = self.inner.blocks[0].mlp
        y: Tensor = mlp.down(mlp.inner_dropout(F.gelu(mlp.up(x))))
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self._mlp, self.inner(x), use_reentrant=False)
        return y


def by_parts() -> tuple[str, str, str]:
    """Errors of such a model with dropout and without, and of a call of a layer alone."""
    said = []
    for rate in (RATE, 0.0):
        model = ByParts(rate)
        said.append(raised_error(lambda model=model: (shard(model, 4), step(model, 4))))
    alone = sharded(4)
    said.append(raised_error(lambda: alone.blocks[0].mlp.up(inputs(4))))
    return said[0], said[1], said[2]


class Parallel(nn.Module):
    """Calls its feed-forward network between the column and the row layers of its attention."""

    def __init__(self) -> None:
        super().__init__()
        inner = build_dropout_model(4).blocks[0]
        self.up, self.inner_dropout, self.down = nn.Linear(16, 32), SeenDropout(), nn.Linear(32, 16)
        self.mlp = inner.mlp

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.up(x)) * 2
        x = x + self.mlp(x)
        out: Tensor = x + self.down(self.inner_dropout(y))
        return out


class ParallelModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Parallel()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


def nested() -> tuple[str, Tensor, Tensor, Tensor]:
    """Masks of a region that another one interrupts: of the outer region, of the inner one, and
    behind that."""
    torch.manual_seed(0)
    model = ParallelModel()
    shard(model, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number in range(3):
        step(model, 4, number)
        optimizer.step()
        optimizer.zero_grad()
    block = model.block
    return (
        replica_difference(model),
        block.inner_dropout.seen[0],
        block.mlp.inner_dropout.seen[0],
        block.mlp.residual_dropout.seen[0],
    )


def experts() -> tuple[str, str]:
    """Errors of experts that drop features in their own forward, and of others."""
    said = []
    for rate in (0.2, 0.0):
        changes = {"num_local_experts": 4, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
        model = build("mixtral", tied=False, **changes)
        for layer in model.model.layers:
            layer.mlp.experts.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(rate))
        deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
        said.append(raised_error(lambda model=model: model(input_ids=tokens(0))))
    return said[0], said[1]
