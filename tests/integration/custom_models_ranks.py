# SPDX-License-Identifier: Apache-2.0
"""Models that no library knows, in initialize."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

import deepspeed_autotp
from tests.support.custom_models import (
    HIDDEN,
    Block,
    FeedForward,
    GroupedProjection,
    Language,
    batch,
    build,
)
from tests.support.log_records import logged_warnings

STEPS = 3


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def single_losses(model: nn.Module) -> list[float]:
    optimizer = adam(model)
    losses = []
    for step in range(STEPS):
        loss = model(*batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def engine_of(model: nn.Module, tp: int, **more: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "tensor_parallel": {"autotp_size": tp},
    }
    engine, *_ = deepspeed_autotp.initialize(
        model=model, optimizer=adam(model), config=config, **more
    )
    return engine


def train(name: str, tp: int) -> dict[str, Any]:
    """Worst difference of the losses, the part of the parameters that a rank holds, the kinds of
    the first block's weights, and what was warned of."""
    expected, model = single_losses(build(name)), build(name)
    total = sum(p.numel() for p in model.parameters())
    with logged_warnings() as warnings:
        engine = engine_of(model, tp)
    worst = 0.0
    for step, loss_before in enumerate(expected):
        loss = engine(*batch(step))
        engine.backward(loss)
        engine.step()
        worst = max(worst, abs(float(loss.detach()) - loss_before))
    plan = deepspeed_autotp.tensor_parallel(model).plan
    return {
        "worst": worst,
        "part": sum(p.numel() for p in model.parameters()) / total,
        "kinds": {e.name: str(e.kind) for e in plan.entries if e.name.startswith("blocks.0.")},
        "warnings": list(warnings),
    }


class Regression(nn.Module):
    """Takes features, which cannot be inferred."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return (self.fc2(self.fc1(x).relu()) - wanted).square().mean()


def _groups_rule() -> dict[str, Any]:
    """A rule for ``wqkv`` as groups of [queries, key, value], and for its output."""
    specs = [
        {"patterns": [r".*wqkv\."], "shape": [6, -1, HIDDEN], "partition_dim": 0},
        {"patterns": [r".*wo\.", r".*fc2\.weight"], "partition_type": "row"},
        {"patterns": [r".*fc1\."]},
    ]
    return {"partition_config": {"layer_specs": specs, "use_default_specs": False}}


def groups_by_rule(groups: str) -> tuple[list[str], float] | str:
    """The kinds of the attention's weights, and the difference of the losses; or the error."""
    torch.manual_seed(0)
    model = Language([Block(GroupedProjection(groups), FeedForward())])
    expected = float(model(*batch(0)).detach())
    tokens, targets = batch(0)
    try:
        deepspeed_autotp.parallelize(
            model,
            tp_size=dist.get_world_size(),
            config=_groups_rule(),
            example_inputs={"tokens": tokens, "targets": targets},
        )
    except ValueError as error:
        return str(error)
    entries = deepspeed_autotp.tensor_parallel(model).plan.entries
    kinds = [f"{e.name}: {e.kind}" for e in entries if ".attention." in e.name]
    return kinds, abs(float(model(tokens, targets).detach()) - expected)


def refused_without_inputs() -> str:
    try:
        engine_of(Regression(), 2)
    except ValueError as error:
        return str(error)
    return "not refused"


def kinds_with(way: str) -> list[str]:
    """The kinds of the weights where the inputs are given in some way."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(6, HIDDEN, generator=draw)
    more: dict[str, Any] = {
        "example_inputs": {"example_inputs": {"x": rows, "wanted": rows}},
        "data set of tuples": {"training_data": TensorDataset(rows, rows)},
        "data set of dictionaries": {"training_data": [{"x": r, "wanted": r} for r in rows]},
        "collate_fn": {
            "training_data": list(rows),
            "collate_fn": lambda samples: {"x": torch.stack(samples), "wanted": rows[:2]},
        },
    }[way]
    model = Regression()
    engine_of(model, 2, **more)
    return [str(entry.kind) for entry in deepspeed_autotp.tensor_parallel(model).plan.entries]
