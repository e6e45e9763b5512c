# SPDX-License-Identifier: Apache-2.0
"""Training of the models of tests.support.encoder_models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from deepspeed_autotp._core import index_pattern
from deepspeed_autotp.interop.transformers import other_modalities, token_inputs
from tests.support.encoder_models import ROWS, VOCABULARY, batch, build
from tests.support.log_records import logged_warnings
from tests.support.loss_curves import RATE, STEPS, worst_difference


@dataclass(frozen=True, slots=True)
class Trained:
    """Losses and weights against one process, the share of the parameters that this rank holds,
    the same of those of a submodule, the replicated matrices, and warnings."""

    apart: float
    weights: float
    share: float
    shares: Mapping[str, float]
    replicated: frozenset[str]
    warnings: tuple[str, ...]


class Loop:
    """SGD, a step at a time; ``losses`` has one number for each."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self._name, self._model = name, model
        self._optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        self.losses: list[float] = []

    def step(self) -> None:
        loss = self._model(**batch(self._name, len(self.losses))).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(float(loss.detach()))

    def run(self) -> list[float]:
        for _ in range(STEPS):
            self.step()
        return self.losses


def train(name: str, parts: Sequence[str], images: bool) -> Trained:
    """Sharded over all ranks and in one process. ``images``: the self-check gets a full batch."""
    alone, model = build(name), build(name)
    expected = Loop(name, alone).run()
    with logged_warnings() as texts:
        deepspeed_autotp.parallelize(
            model,
            tp_size=dist.get_world_size(),
            example_inputs=batch(name, 0) if images else None,
        )
    losses = Loop(name, model).run()
    return compare(alone, model, (losses, expected), parts, texts)


def train_engine(name: str) -> Trained:
    """As ``train``, with DeepSpeed's ZeRO 1."""
    alone, model = build(name), build(name)
    expected = Loop(name, alone).run()
    with logged_warnings() as texts:
        engine = engine_of(model)
    losses = [engine_step(engine, name, step) for step in range(STEPS)]
    return compare(alone, model, (losses, expected), (), texts)


def engine_of(model: nn.Module) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1},
        "tensor_parallel": {"autotp_size": dist.get_world_size()},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def engine_step(engine: Any, name: str, step: int) -> float:
    loss = engine(**batch(name, step)).loss
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def compare(
    alone: nn.Module,
    model: nn.Module,
    losses: tuple[list[float], list[float]],
    parts: Sequence[str],
    texts: Sequence[str],
) -> Trained:
    own, expected = losses
    assert abs(expected[-1] - expected[0]) > 1e-2  # or nothing was trained
    deepspeed_autotp.check_replicas(model)
    full = deepspeed_autotp.full_state_dict(model)
    entries = deepspeed_autotp.tensor_parallel(model).plan.entries
    return Trained(
        apart=worst_difference(own, expected),
        weights=max(float((full[n] - p.detach()).abs().max()) for n, p in alone.named_parameters()),
        share=_size(model) / _size(alone),
        shares={part: _size(model, part) / _size(alone, part) for part in parts},
        replicated=frozenset(
            index_pattern(entry.name)
            for entry in entries
            if entry.dim < 0 and full[entry.name].dim() > 1
        ),
        warnings=tuple(texts),
    )


def _size(model: nn.Module, part: str = "") -> int:
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith(part))


def train_in_turn(first: str, second: str, shared: bool) -> list[Trained]:
    """Two models of one process, a step of each in turn; over one group, or each over its own."""
    names = (first, second)
    alone = [build(name) for name in names]
    expected = [Loop(name, model).run() for name, model in zip(names, alone, strict=True)]
    models = [build(name) for name in names]
    group = dist.new_group() if shared else None
    with logged_warnings() as texts:
        for model in models:
            size = None if shared else dist.get_world_size()
            deepspeed_autotp.parallelize(model, tp_size=size, tp_group=group)
    loops = [Loop(name, model) for name, model in zip(names, models, strict=True)]
    for _ in range(STEPS):
        for loop in loops:
            loop.step()
    return [
        compare(alone[i], models[i], (loops[i].losses, expected[i]), (), texts) for i in range(2)
    ]


def engines_in_turn(first: str, second: str) -> list[Trained]:
    """Two engines of one process, a step of each in turn."""
    names = (first, second)
    alone = [build(name) for name in names]
    expected = [Loop(name, model).run() for name, model in zip(names, alone, strict=True)]
    models = [build(name) for name in names]
    with logged_warnings() as texts:
        engines = [engine_of(model) for model in models]
    losses: tuple[list[float], list[float]] = ([], [])
    for step in range(STEPS):
        for engine, name, seen in zip(engines, names, losses, strict=True):
            seen.append(engine_step(engine, name, step))
    return [compare(alone[i], models[i], (losses[i], expected[i]), (), texts) for i in range(2)]


def seen_of(name: str) -> tuple[list[str], set[int]]:
    """The submodels with another configuration, and the tokens that the self-check draws where all
    but two stand for something else than text."""
    model = build(name)
    for token in range(VOCABULARY - 2):
        vars(model.config)[f"sound{token}_token_id"] = token
    inputs = token_inputs(model, device=torch.device("cpu"))
    assert inputs is not None
    return other_modalities(model), set(inputs["input_ids"].flatten().tolist())
