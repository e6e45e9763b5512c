# SPDX-License-Identifier: Apache-2.0
"""One short training run, in a single process and through DeepSpeed, for comparison."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.support.small_models import build, tokens

STEPS = 4
RATE = 0.1


@dataclass(frozen=True, slots=True)
class Setting:
    """What one sharded run is made with."""

    tp: int
    zero: int
    clip: float
    precision: str = "fp32"
    accumulate: int = 1
    self_check: bool | str = "auto"
    sequence: bool = False
    length: int = 12


def single_losses(
    model: nn.Module, *, clip: float, steps: int = STEPS, length: int = 12
) -> list[float]:
    """Losses of plain SGD over the whole batch; clips the gradient norm when ``clip`` > 0."""
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


def engine_config(setting: Setting) -> dict[str, Any]:
    """A DeepSpeed configuration for the four rows of :func:`tokens`."""
    world = dist.get_world_size()
    replicas = world // setting.tp
    micro = 4 // replicas // setting.accumulate
    return {
        "train_batch_size": micro * setting.accumulate * world,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": setting.accumulate,
        "gradient_clipping": setting.clip,
        "zero_optimization": {"stage": setting.zero},
        "bf16": {"enabled": setting.precision == "bf16"},
        "tensor_parallel": {
            "autotp_size": setting.tp,
            "self_check": setting.self_check,
            "sequence_parallel": setting.sequence,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


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
    """Losses of the whole batch from step ``first``, as :func:`single_losses` has them."""
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
