# SPDX-License-Identifier: Apache-2.0
"""Loss curves of a short training run, in one process and through DeepSpeed."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.support.engine_config import Setting, engine_config
from tests.support.small_models import build, tokens

STEPS = 4
RATE = 0.1


def single_losses(
    model: nn.Module, *, clip: float, steps: int = STEPS, length: int = 12
) -> list[float]:
    """Losses of plain SGD over the full batch; clips the gradient norm when ``clip`` > 0."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(steps):
        ids = tokens(step, length=length)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def own_rows(ids: torch.Tensor, *, tp: int) -> torch.Tensor:
    """The rows of this rank's replica: the ranks of one model follow one another."""
    return ids.chunk(dist.get_world_size() // tp)[dist.get_rank() // tp]


def train_engine(
    engine: Any,
    *,
    tp: int,
    accumulate: int = 1,
    first: int = 0,
    steps: int = STEPS,
    length: int = 12,
) -> list[float]:
    """Losses of the full batch from step ``first``, as :func:`single_losses` has them."""
    losses = []
    for step in range(first, first + steps):
        total = torch.zeros(())
        for ids in own_rows(tokens(step, length=length), tp=tp).chunk(accumulate):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach() / accumulate
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return losses


def worst_difference(got: Iterable[float], expected: Iterable[float]) -> float:
    """The largest relative difference of two loss curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))


def train_family(
    family: str, tied: bool, settings: list[Setting], changes: Mapping[str, Any] | None = None
) -> dict[Setting, float]:
    """Worst loss difference to one process for every setting; replicas and weights are checked."""
    import deepspeed_autotp

    sizes = changes or {}
    expected = {
        (clip, length): single_losses(build(family, tied=tied, **sizes), clip=clip, length=length)
        for clip, length in sorted({(setting.clip, setting.length) for setting in settings})
    }
    worst = {}
    for setting in settings:
        model = build(family, tied=tied, **sizes)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        identities = [id(p) for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        engine, *_ = deepspeed_autotp.initialize(
            model=model, optimizer=optimizer, config=engine_config(setting)
        )
        assert [id(p) for p in model.parameters()] == identities
        after = deepspeed_autotp.full_state_dict(engine)
        assert all(torch.equal(t.to(after[name].dtype), after[name]) for name, t in before.items())
        losses = train_engine(
            engine, tp=setting.tp, accumulate=setting.accumulate, length=setting.length
        )
        worst[setting] = worst_difference(losses, expected[setting.clip, setting.length])
        deepspeed_autotp.check_replicas(engine)
        engine.destroy()
    return worst


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=RATE)
