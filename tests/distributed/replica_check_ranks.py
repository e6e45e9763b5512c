# SPDX-License-Identifier: Apache-2.0
"""What the ranks do: ranks that hold the same, and ranks that do not."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.engine_config import Setting, engine_config
from tests.support.handmade_model import PARTITION, build_handmade, example
from tests.support.log_records import LoggedMessages
from tests.support.loss_curves import train_engine
from tests.support.replica_difference import replica_difference
from tests.support.small_models import build, model_with_buffers, tokens
from tests.support.training_loops import train_sharded

UNEVEN: dict[str, Any] = {
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "hidden_size": 96,
}


def sharded(**changes: Any) -> nn.Module:
    model = build("llama", tied=False, **changes)
    return deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())


def drifts(names: list[str]) -> list[str]:
    """The error of the check before, and after the last rank has changed these weights."""
    model = sharded(num_key_value_heads=1)
    train_sharded(model, steps=1)
    found = [replica_difference(model)]
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).view(-1)[-1] += 1e-6
    return [*found, replica_difference(model)]


def drifts_in_engine(zero: int) -> list[str]:
    """The same with DeepSpeed, TP 2 x DP 2: one rank of each model changes a norm."""
    model = build("llama", tied=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = engine_config(Setting(tp=2, zero=zero, clip=1.0))
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)
    train_engine(engine, tp=2, steps=1)
    found = [replica_difference(engine)]
    weight = model.get_parameter("model.norm.weight")
    if dist.get_rank() % 2 == 0:
        held = weight.ds_tensor if zero == 3 else weight  # type: ignore[attr-defined]
        held.data.add_(1)
    return [*found, replica_difference(engine)]


def share(seeds: list[int], tp: int) -> tuple[list[str], bool]:
    """Warnings, and whether every model is then that of its TP rank 0."""
    rank = dist.get_rank()
    model = model_with_buffers(seeds[rank])
    with LoggedMessages() as said:
        deepspeed_autotp.parallelize(model, tp_size=tp)
    first = model_with_buffers(seeds[rank // tp * tp]).state_dict()
    full = deepspeed_autotp.full_state_dict(model)
    return said, all(torch.equal(full[name], tensor) for name, tensor in first.items())


def rng_states() -> tuple[float, float]:
    """Of the RNG states of ranks that were seeded differently: before and after."""
    model = build("llama", tied=False)
    torch.manual_seed(dist.get_rank())
    before = float(torch.get_rng_state().sum())
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    return before, float(torch.rand(()))


def train_with_dropout(changes: dict[str, Any], residual: bool) -> tuple[str, list[float]]:
    """The check after training with dropout of the attention weights, and of what every MLP
    adds to the residual stream."""
    model = build(
        "llama", tied=False, attn_implementation="eager", attention_dropout=0.1, **changes
    )
    if residual:
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda m, a, y: F.dropout(y, 0.1, m.training))
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    losses, _ = train_sharded(model, steps=4)
    return replica_difference(model), losses


def checkpointed_dropout() -> tuple[float, bool]:
    """Two steps with heads and inner features that the ranks do not share evenly, with and
    without recomputation: the largest difference of a gradient, and whether the RNG state is the
    same afterwards."""
    found = []
    for recompute in (False, True):
        changes = UNEVEN | {"intermediate_size": 113, "attention_dropout": 0.2}
        model = build("llama", tied=False, attn_implementation="eager", **changes)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
        torch.manual_seed(7)
        for step in range(2):
            model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        found.append(([p.grad for p in model.parameters()], float(torch.rand(()))))
    (expected, after), (again, later) = found
    pairs = zip(expected, again, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs if a is not None), after == later


def seeded_by_rank() -> tuple[str, list[float], list[str]]:
    """As many people seed, after the model is sharded; with dropout over what all ranks hold."""
    model = build("llama", tied=False)
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda m, a, y: F.dropout(y, 0.1, m.training))
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    torch.manual_seed(dist.get_rank())
    with LoggedMessages() as said:
        losses, _ = train_sharded(model, steps=3)
    return replica_difference(model), losses, said


class Dropping(nn.Module):
    """A model with dropout of replicated activations."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_handmade()
        for block in self.inner.blocks:
            block.norms[0] = nn.Sequential(block.norms[0], nn.Dropout(0.2))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.inner(x, target)
        return loss


def train_handmade_with_dropout() -> tuple[str, list[float]]:
    model = Dropping()
    config = {"partition_config": PARTITION}
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(4):
        loss = model(**example(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return replica_difference(model), losses


def dropped_output() -> Tensor:
    """Of a model that is training, on ranks that were seeded differently."""
    torch.manual_seed(dist.get_rank())
    model = sharded(attention_dropout=0.0)
    model.model.embed_tokens.register_forward_hook(lambda m, a, y: F.dropout(y, 0.5))
    with torch.no_grad():
        out: Tensor = model(input_ids=tokens(0)).logits
    return out
