# SPDX-License-Identifier: Apache-2.0
"""What the ranks do: thousands of steps in bfloat16 with dropout, clipping and AdamW."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import deepspeed_autotp
from tests.support.chain_tokens import chain_tokens
from tests.support.replicated_values import differing_values
from tests.support.small_models import build

RATE, CLIP, DROPOUT = 1e-3, 1.0, 0.1
# A block of the second layer stays on every rank in full, so that each computes products that the
# others compute, too.
REPLICATED = {"patterns": [r".*layers\.1\.mlp\..*weight$"], "partition_type": "skip"}


@dataclass(frozen=True, slots=True)
class Run:
    """One training run, with dropout of the embeddings, whose masks are those of one process.
    ``order`` numbers an order of the inner features, 0 that of the model: another order of the sums
    in one process. ``rounds_otherwise``: products of replicated layers differ by a bit on every
    other rank."""

    way: str  # "parallelize" or "initialize"
    steps: int
    every: int = 500
    order: int = 0
    rounds_otherwise: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """Losses of all steps, and what differed between ranks in the steps that were looked at."""

    losses: list[float]
    differing: dict[int, list[str]]


def train(run: Run) -> Found:
    """At the TP size of all ranks; one rank trains the unsharded model."""
    model = _model(run)
    stepping, optimizer, step = (_engine if run.way == "initialize" else _loop)(model, run)
    losses, differing = [], {}
    for number in range(run.steps):
        torch.manual_seed(number)  # so that masks of one process and of the ranks can be equal
        losses.append(step(chain_tokens(number)))
        if dist.get_world_size() > 1 and (number + 1) % run.every == 0:
            differing[number + 1] = differing_values(stepping, optimizer)
    if run.way == "initialize":
        stepping.destroy()
    return Found(losses, differing)


def _model(run: Run) -> nn.Module:
    model = build("llama", tied=False, num_key_value_heads=2, attn_implementation="eager")
    model.model.embed_tokens.register_forward_hook(_drop)
    for layer in model.model.layers:
        if run.order:
            _reorder(layer.mlp, torch.Generator().manual_seed(run.order))
    return model


def _drop(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return F.dropout(output, DROPOUT, module.training)


@torch.no_grad()
def _reorder(mlp: Any, draw: torch.Generator) -> None:
    """Another order of the inner features, with which the model is the same function."""
    order = torch.randperm(mlp.down_proj.weight.shape[1], generator=draw)
    for layer, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
        layer.weight.copy_(layer.weight.index_select(dim, order))


def _let_round_otherwise(model: nn.Module) -> None:
    """Products of replicated layers, and of their weight gradients, differ by a bit on this rank
    from those of other ranks: now and then in 16 bits, mostly in float32."""
    draw = torch.Generator().manual_seed(dist.get_rank())

    def rounded(value: torch.Tensor) -> torch.Tensor:
        integers = torch.int32 if value.dtype == torch.float32 else torch.int16
        step = torch.randint(-1, 2, value.shape, generator=draw)
        if integers == torch.int16:
            step *= torch.rand(value.shape, generator=draw) < 2**-13
        return (value.contiguous().view(integers) + step.to(integers)).view(value.dtype)

    def after(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output + (rounded(output.detach()) - output.detach())

    for entry in deepspeed_autotp.tensor_parallel(model).plan.entries:
        if not entry.is_sharded and len(entry.shape) == 2:
            model.get_submodule(entry.name.rpartition(".")[0]).register_forward_hook(after)
            model.get_parameter(entry.name).register_hook(rounded)


def _section() -> dict[str, Any]:
    return {
        "autotp_size": dist.get_world_size(),
        "preset_model": "llama",
        "partition_config": {"layer_specs": [REPLICATED]},
        "self_check": False,
    }


def _loop(model: nn.Module, run: Run) -> Any:
    if dist.get_world_size() > 1:
        deepspeed_autotp.parallelize(model, config=_section())
        if run.rounds_otherwise and dist.get_rank() % 2:
            _let_round_otherwise(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def step(ids: torch.Tensor) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return model, optimizer, step


def _engine(model: nn.Module, run: Run) -> Any:
    ranks = dist.get_world_size()
    config = {
        "train_batch_size": 4 * ranks,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "tensor_parallel": _section() if ranks > 1 else {"autotp_size": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)
    if run.rounds_otherwise and dist.get_rank() % 2:
        _let_round_otherwise(model)

    def step(ids: torch.Tensor) -> float:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return engine, optimizer, step
