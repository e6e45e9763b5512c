# SPDX-License-Identifier: Apache-2.0
"""Faults that a glance at a few layers, or at a model as it begins, does not show."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.dropout_model import build_dropout_model, inputs, masks_of, shard
from tests.support.log_records import logged_warnings
from tests.support.loss_curves import worst_difference
from tests.support.model_snapshot import refusal
from tests.support.raised_error import raised_error
from tests.support.replica_difference import replica_difference
from tests.support.small_models import build, tokens

STEPS = 4
SIZE, HEADS = 32, 4


class Attention(nn.Module):
    """Uses a learnt temperature for its own heads, or for its output.

    hides  "" or what begins at zero: "projection", "gate", or "scale", which is next to it
    """

    def __init__(self, hides: str, *, inside: bool) -> None:
        super().__init__()
        self.num_heads, self.inside = HEADS, inside
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(SIZE, SIZE) for _ in range(4)
        )
        self.temperature = nn.Parameter(torch.ones(1))
        start = {"gate": torch.zeros(1), "scale": torch.full((SIZE,), 1e-6)}
        self.gate = nn.Parameter(start[hides]) if hides in start else None
        if hides == "projection":
            nn.init.zeros_(self.o_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = q * self.temperature * 3 if self.inside else q
        y = F.scaled_dot_product_attention(q, k * 3, v, is_causal=True).transpose(1, 2).flatten(2)
        y = self.o_proj(y)
        y = y if self.inside else y * self.temperature
        return y if self.gate is None else y * self.gate


class Model(nn.Module):
    """``inside`` says of each layer where it uses its temperature."""

    def __init__(self, hides: str, inside: tuple[bool, ...]) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, SIZE)
        self.attention = nn.ModuleList(Attention(hides, inside=each) for each in inside)
        self.head = nn.Linear(SIZE, 96)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for attention in self.attention:
            x = x + attention(F.layer_norm(x, (SIZE,)))
        loss = F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
        return {"loss": loss}


def _train(model: nn.Module) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.02), []
    for number in range(STEPS):
        loss = model(input_ids=tokens(number), labels=tokens(number))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def hidden(hides: str, inside: tuple[bool, ...]) -> tuple[float, str, int]:
    """How far losses are from those of one process, replicas that differ, and warnings."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Model(hides, inside))
    expected = _train(models[0])
    with logged_warnings() as warnings:
        deepspeed_autotp.parallelize(models[1], tp_size=dist.get_world_size())
    apart = worst_difference(_train(models[1]), expected)
    same = all(
        torch.allclose(p, models[0].get_parameter(n), atol=1e-5)
        for n, p in models[1].named_parameters()
        if n.endswith("temperature")
    )
    return apart if same else torch.inf, replica_difference(models[1]), len(warnings)


def rule_for_one_layer(layer: int) -> str:
    """The refusal of rules that forget to sum a gradient in one layer."""
    skip = {"partition_type": "skip"}
    specs = [
        {"patterns": [rf".*layers\.{layer}\..*[qk]_norm\.weight$"], **skip},
        {"patterns": [r".*[qk]_norm\.weight$"], **skip, "grad_allreduce": True},
        {"patterns": [r".*\.(q|k|v|gate|up)_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.(o|down)_proj\.weight$"], "partition_type": "row"},
    ]
    model = build("qwen3", tied=False, num_hidden_layers=5)
    config = {"partition_config": {"layer_specs": specs}}
    ranks = dist.get_world_size()
    return refusal(model, lambda: deepspeed_autotp.parallelize(model, tp_size=ranks, config=config))


def modes(heads: int, change: str) -> tuple[str, bool]:
    """Replicas that differ after steps in which not all of a model is in training mode, and whether
    the ranks have the same RNG state."""
    model = build_dropout_model(heads)
    shard(model, heads)
    column, row = model.blocks[0].attention.q_proj, model.blocks[0].attention.o_proj
    if change == "dropout alone":
        model.eval()
        for module in model.modules():
            module.training = isinstance(module, nn.Dropout)
    else:
        {"column": column, "row": row}[change].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number in range(STEPS):
        model(inputs(heads, number)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(masks_of(model).values())
    states = [torch.empty_like(torch.get_rng_state()) for _ in range(dist.get_world_size())]
    dist.all_gather(states, torch.get_rng_state())
    return replica_difference(model), all(torch.equal(state, states[0]) for state in states)


class RandomMask(nn.Module):
    """Drops some of its input by a mask of its own, between a column and a row layer."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(SIZE, SIZE) for _ in range(4)
        )
        self.num_heads, self.draw = HEADS, draw

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        x = x * self.draw(x)
        k, v = self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        y: Tensor = self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand_like": lambda x: (torch.rand_like(x) > 0.3).to(x),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.7)),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.7),
}


def drawn(draw: str) -> tuple[str, int]:
    """Replicas that differ where a model draws masks itself, and the warnings."""
    torch.manual_seed(0)
    model = nn.Sequential(RandomMask(DRAWS[draw]), nn.Linear(SIZE, 4))
    x = torch.randn(2, 6, SIZE, generator=torch.Generator().manual_seed(1))
    with logged_warnings() as warnings:
        deepspeed_autotp.parallelize(
            model, tp_size=dist.get_world_size(), example_inputs={"input": x}
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return replica_difference(model), len(warnings)


def _step(model: Any) -> None:
    model(input_ids=tokens(0), labels=tokens(0)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def replaced() -> dict[str, str]:
    """What training says of a sharded model of which a part was copied or replaced."""
    ranks, found = dist.get_world_size(), {}

    def made() -> Any:
        return deepspeed_autotp.parallelize(build("qwen3", tied=False), tp_size=ranks)

    model = made()
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])
    found["layer"] = raised_error(lambda: _step(model))
    body = copy.deepcopy(made().model)
    found["body"] = raised_error(lambda: body(input_ids=tokens(0)))
    with torch.no_grad():
        found["body without gradients"] = raised_error(lambda: body(input_ids=tokens(0)))
    model = made()
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    found["assigned"] = raised_error(lambda: _step(model))
    model = made()
    model.lm_head = nn.Sequential(model.lm_head)
    found["wrapped"] = raised_error(lambda: _step(model))
    whole = copy.deepcopy(made())
    found["whole"] = raised_error(lambda: _step(whole))
    return found


def called_within(family: str, **changes: Any) -> tuple[float, bool]:
    """Loss, beside that of one process, of a forward in which the model is called without labels;
    and whether that call gives the logits of one process."""
    losses, logits = [], []
    unsharded = build(family, tied=False, **changes)
    model = copy.deepcopy(unsharded)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    for one in (unsharded, model):
        inner: list[Tensor] = []

        def call(*_: Any, one: Any = one, inner: list[Tensor] = inner) -> None:
            if not inner:
                inner.append(torch.empty(0))
                with torch.no_grad():
                    inner[0] = one(input_ids=tokens(1)).logits

        one.model.layers[0].register_forward_hook(call)
        losses.append(float(one(input_ids=tokens(0), labels=tokens(0)).loss.detach()))
        logits.append(inner[0])
    return abs(losses[0] / losses[1] - 1), torch.allclose(*logits, atol=1e-5)
