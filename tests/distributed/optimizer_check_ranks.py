# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_optimizer_check.py do."""

import gc
import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from tests.support.loss_curves import RATE
from tests.support.raised_error import raised_error
from tests.support.small_models import build, tokens


def stepped(model: nn.Module, cls: type[torch.optim.Optimizer], trained: str) -> tuple[str, bool]:
    """What a step raises, and whether a weight moved."""
    own = [p for name, p in model.named_parameters() if trained in name]
    optimizer = cls(own)  # type: ignore[call-arg]
    model(input_ids=tokens(0), labels=tokens(0)).loss.backward()
    before = [p.detach().clone() for p in own]
    text = raised_error(optimizer.step)
    return text, any(not torch.equal(a, b) for a, b in zip(before, own, strict=True))


def steps() -> list[tuple[str, bool]]:
    """Of a sharded model: all weights, replicated ones only, another optimizer; an unsharded one;
    and one after the sharded model is gone."""
    model = build("llama", tied=False)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    unsharded = build("llama", tied=False)
    return [
        stepped(model, torch.optim.Adafactor, ""),
        stepped(model, torch.optim.Adafactor, "norm"),
        stepped(model, torch.optim.AdamW, ""),
        stepped(unsharded, torch.optim.Adafactor, ""),
    ]


def parameters_of_own(how: str) -> tuple[str, bool]:
    """What is said of a parameter that is added to a sharded model, or of a gradient hook that one
    has before; and whether a weight moved."""
    model = build("llama", tied=False)
    up_proj: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    if how == "hook":
        up_proj.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
        before = up_proj.weight.detach().clone()
        said = raised_error(
            lambda: deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
        )
        return said, not torch.equal(before, up_proj.weight)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    slope = nn.Parameter(torch.ones(()))
    up_proj.register_parameter("slope", slope)
    up_proj.register_forward_hook(lambda module, args, output: output * slope)
    return stepped(model, torch.optim.SGD, "")


def drift(kind: str) -> tuple[int, str]:
    """How many steps a loop takes, at most 16, and what ends it."""
    model = build("llama", tied=False)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    steps = 0

    def step() -> None:
        model(input_ids=tokens(steps), labels=tokens(steps)).loss.backward()
        if kind == "torch's clipping":
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        elif kind == "our clipping":
            deepspeed_autotp.clip_grad_norm_(model, 0.5)
        elif kind == "a norm of shards":
            own = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.cat([each.flatten() for each in own]).norm()
            nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
        if not (kind == "a skipped step" and steps == 5 and dist.get_rank() == 1):
            optimizer.step()
        optimizer.zero_grad()

    text = "nothing"
    while steps < 16 and text == "nothing":
        text = raised_error(step)
        steps += text == "nothing"
    assert weight.isfinite().all()
    return steps, text


def hooks() -> tuple[int, int, int]:
    """Hooks of all optimizers before, with and after a sharded model."""
    held = vars(importlib.import_module("torch.optim.optimizer"))["_global_optimizer_pre_hooks"]
    before = len(held)
    model = build("llama", tied=False)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    during = len(held)
    del model
    gc.collect()
    return before, during, len(held)
