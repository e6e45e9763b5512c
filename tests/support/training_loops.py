# SPDX-License-Identifier: Apache-2.0
"""A plain training loop in float64, of an unsharded and of a sharded llama."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import deepspeed_autotp
from tests.support.loss_curves import RATE
from tests.support.small_models import build, tokens

STEPS = 5
CLIP = 0.5


def make(**changes: Any) -> nn.Module:
    """A llama in float64."""
    return build("llama", tied=changes.pop("tied", False), **changes).double()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """As the model computes it with labels, but in float64."""
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(
    model: nn.Module, clip: Callable[[float], Tensor], *, steps: int = STEPS, accumulate: int = 1
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of SGD on the full batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    losses, norms = [], []
    for step in range(steps):
        total = 0.0
        for ids in tokens(step, vocabulary=inner.config.vocab_size).chunk(accumulate):
            loss = loss_of(model, ids) / accumulate
            loss.backward()
            total += float(loss.detach())
        norms.append(float(clip(CLIP).detach()))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms


def train_unsharded(model: nn.Module, **more: Any) -> tuple[list[float], list[float]]:
    parameters = list(model.parameters())
    return train(model, lambda most: torch.nn.utils.clip_grad_norm_(parameters, most), **more)


def train_sharded(model: nn.Module, **more: Any) -> tuple[list[float], list[float]]:
    return train(model, lambda most: deepspeed_autotp.clip_grad_norm_(model, most), **more)


def apart(
    unsharded: nn.Module,
    sharded: nn.Module,
    curves: tuple[tuple[list[float], list[float]], tuple[list[float], list[float]]],
) -> dict[str, float]:
    """Largest differences of the losses, of the norms, and of the weights."""
    (losses, norms), (own_losses, own_norms) = curves
    weights = deepspeed_autotp.full_state_dict(sharded)
    deepspeed_autotp.check_replicas(sharded)
    return {
        "loss": max(abs(a - b) for a, b in zip(own_losses, losses, strict=True)),
        "norm": max(abs(a - b) for a, b in zip(own_norms, norms, strict=True)),
        "weights": max(
            float((weights[n] - t).abs().max()) for n, t in unsharded.state_dict().items()
        ),
    }


SHAPES: dict[str, dict[str, Any]] = {
    "8 heads, 2 keys": {"num_key_value_heads": 2},
    "8 heads, 1 key": {"num_key_value_heads": 1},
    "12 heads, 3 keys": {
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
        "hidden_size": 96,
    },
    "6 heads": {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 60},
    "uneven vocabulary": {"vocab_size": 257},
    "uneven vocabulary, tied": {"vocab_size": 257, "tied": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
}
