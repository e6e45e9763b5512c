# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_grad_scaler.py do."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.loss_curves import RATE
from tests.support.small_models import build, tokens

STEPS = 50
HIT = (7, 8, 23)  # steps with an infinite gradient, of one weight
OPTIONS: dict[str, Any] = {"init_scale": 2.0**10, "growth_interval": 4}


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "fused":
        return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return torch.optim.SGD(model.parameters(), lr=RATE)


def train(
    model: nn.Module, scaler: torch.amp.GradScaler, kind: str, *, is_hit: bool
) -> tuple[list[float], list[float], list[bool]]:
    """Losses, scales and whether weights moved, in float16 under autocast.

    Where ``is_hit``, a weight of this rank has infinite gradients at the steps ``HIT``. ``kind``
    "clipped" unscales and clips before the step.
    """
    optimizer = optimizer_of(model, kind)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    losses, scales, moved = [], [], []
    for step in range(STEPS):
        ids = tokens(step)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        if is_hit and step in HIT:
            weight.grad = torch.full_like(weight, torch.inf)
        if kind == "clipped":
            scaler.unscale_(optimizer)
            if isinstance(scaler, deepspeed_autotp.GradScaler):
                deepspeed_autotp.clip_grad_norm_(model, 0.5)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        scales.append(scaler.get_scale())
        moved.append(not torch.equal(before, weight))
    return losses, scales, moved


def against_one_process(kind: str) -> dict[str, Any]:
    """The same loop over one process with torch's scaler, and over the ranks with ours."""
    unsharded = build("llama", tied=False)
    expected = train(unsharded, torch.amp.GradScaler("cpu", **OPTIONS), kind, is_hit=True)
    model = build("llama", tied=False)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    scaler = deepspeed_autotp.GradScaler("cpu", model=model, **OPTIONS)
    found = train(model, scaler, kind, is_hit=dist.get_rank() == 1)
    deepspeed_autotp.check_replicas(model)
    return {
        "losses": max(abs(a - b) for a, b in zip(found[0], expected[0], strict=True)),
        "scales": (found[1], expected[1]),
        "moved": (found[2], expected[2]),
    }


def without_gradients() -> tuple[float, float, bool]:
    """Scales before and after a step, and whether a weight of rank 0 moved, where rank 1 has no
    gradient and rank 0 an infinite one."""
    model = deepspeed_autotp.parallelize(build("llama", tied=False), tp_size=2)
    scaler = deepspeed_autotp.GradScaler("cpu", model=model, **OPTIONS)
    optimizer = optimizer_of(model, "plain")
    scaler.scale(model(input_ids=tokens(0), labels=tokens(0)).loss).backward()
    before = scaler.get_scale()
    weights = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        is_first = dist.get_rank() == 0
        parameter.grad = torch.full_like(parameter, torch.inf) if is_first else None
    scaler.step(optimizer)
    scaler.update()
    pairs = zip(weights, model.parameters(), strict=True)
    return before, scaler.get_scale(), any(not torch.equal(a, b) for a, b in pairs)


def unsharded() -> list[Tensor]:
    """The weight after a step with a scaler of an unsharded model, and one that is off."""
    found = []
    for enabled in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        scaler = deepspeed_autotp.GradScaler("cpu", enabled=enabled, model=model)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(model.weight.detach())
    return found
