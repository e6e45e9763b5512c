# SPDX-License-Identifier: Apache-2.0
"""What one rank of the sweep does: train a shrunken model alone, then sharded, and compare.

It runs in a worker of the test pool, where a process group spans the ranks of the sweep.
"""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import deepspeed_autotp
from benchmarks.shrink import batch, build, example_inputs
from benchmarks.step_calls import Recorder

STEPS = 4
RATE = 0.1
# The step whose collectives are counted; in earlier ones the ranks compare batches and steps.
COUNTED_STEP = 2
# A weight that hardly moves is compared with this share of the largest movement of the model.
STILL = 1e-3


@dataclass(frozen=True, slots=True)
class Measured:
    """What a rank reports.

    state       trained, refused, damaged (refused, but the model has changed), or unable: the
                single process cannot run it
    losses      largest relative difference to the single process, by clipping norm; and so
    norms       for the gradient norms before clipping
    updates     largest difference of what four steps changed in a weight, relative
    parameters  of the full model, and ``local`` those that this rank holds
    """

    state: str
    reason: str = ""
    losses: Mapping[float, float] = field(default_factory=dict)
    norms: Mapping[float, float] = field(default_factory=dict)
    updates: Mapping[float, float] = field(default_factory=dict)
    parameters: int = 0
    local: int = 0
    forward: int = 0
    backward: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Curve:
    """One training run: losses, gradient norms before clipping, collectives of one step."""

    losses: list[float]
    norms: list[float]
    forward: int
    backward: int


@dataclass(frozen=True, slots=True)
class Alone:
    """The run in one process, and the weights before and after it."""

    curve: Curve
    start: Mapping[str, Tensor]
    end: Mapping[str, Tensor]


class Warnings(logging.Handler):
    """Keeps what the package's logger warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def measure(model_type: str, clips: tuple[float, ...], sequence_parallel: bool = False) -> Measured:
    """Train ``model_type`` alone and sharded over the world, once for each clipping norm.

    What goes wrong in the single process or before the model is sharded is reported; what goes
    wrong in sharded training raises, since the other ranks may wait for this one.
    """
    result = Measured("trained")
    for clip in clips:
        try:
            model = build(model_type)
            start = _weights(model)
            curve = _train(model, model_type, clip, _clip_alone)
        except Exception as error:
            return Measured("unable", _described(error))
        if not all(map(torch.isfinite, map(torch.tensor, curve.losses))):
            return Measured("unable", f"the losses are {curve.losses}")
        alone = Alone(curve, start, _weights(model))
        config = {"sequence_parallel": sequence_parallel}
        result = _measure_sharded(model_type, clip, config, alone, result)
        if result.state != "trained":
            break
    return result


def _measure_sharded(
    model_type: str, clip: float, config: dict[str, Any], alone: Alone, before: Measured
) -> Measured:
    model = build(model_type)
    parameters = _size(model)
    inputs = example_inputs(model_type)
    warnings = Warnings()
    log = logging.getLogger("deepspeed_autotp")
    log.addHandler(warnings)
    try:
        ranks = dist.get_world_size()
        deepspeed_autotp.parallelize(model, tp_size=ranks, config=config, example_inputs=inputs)
    except ValueError as error:
        state = "refused" if _is_untouched(model, alone.start) else "damaged"
        return replace(before, state=state, reason=_described(error), parameters=parameters)
    finally:
        log.removeHandler(warnings)
    curve = _train(model, model_type, clip, deepspeed_autotp.clip_grad_norm_)
    got = deepspeed_autotp.full_state_dict(model)
    return replace(
        before,
        losses={**before.losses, clip: _worst(curve.losses, alone.curve.losses)},
        norms={**before.norms, clip: _worst(curve.norms, alone.curve.norms)},
        updates={**before.updates, clip: worst_update(got, alone.start, alone.end)},
        parameters=parameters,
        local=_size(model),
        forward=curve.forward,
        backward=curve.backward,
        warnings=tuple(dict.fromkeys([*before.warnings, *warnings.texts])),
    )


def _train(
    model: nn.Module,
    model_type: str,
    clip: float,
    clip_gradients: Callable[[nn.Module, float], Tensor],
) -> Curve:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses, norms, counts = [], [], (0, 0)
    for step in range(STEPS):
        with Recorder() if step == COUNTED_STEP else nullcontext() as recorder:
            loss = model(**batch(model_type, step)).loss
            forward = len(recorder.calls) if recorder else 0
            loss.backward()
        if recorder:
            counts = forward, len(recorder.calls) - forward
        if clip:
            norms.append(float(clip_gradients(model, clip)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return Curve(losses, norms, *counts)


def _clip_alone(model: nn.Module, max_norm: float) -> Tensor:
    return clip_grad_norm_(model.parameters(), max_norm)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _size(model: nn.Module) -> int:
    """Elements of all parameters; a tied one counts once."""
    return sum(p.numel() for p in model.parameters())


def _is_untouched(model: nn.Module, start: Mapping[str, Tensor]) -> bool:
    now = dict(model.named_parameters())
    return now.keys() == start.keys() and all(torch.equal(p, start[n]) for n, p in now.items())


def _worst(got: list[float], expected: list[float]) -> float:
    pairs = zip(got, expected, strict=True)
    return _largest(abs(a - b) / abs(b) for a, b in pairs)


def worst_update(
    got: Mapping[str, Tensor], start: Mapping[str, Tensor], end: Mapping[str, Tensor]
) -> float:
    """The largest distance of a trained weight from that of the single process, over the distance
    that the weight has come. This sees a gradient that is wrong in a part of a weight."""
    moved = {name: float((end[name] - start[name]).norm()) for name in end}
    least = STILL * max(moved.values())
    return _largest(float((got[name] - end[name]).norm()) / max(moved[name], least) for name in end)


def _largest(values: Iterable[float]) -> float:
    """Infinity if one of them is not a number."""
    return max((math.inf if math.isnan(value) else value for value in values), default=0.0)


def _described(error: Exception) -> str:
    """Type, message and place of an error, the message on one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message} ({Path(frame.filename).name}, {frame.name})"
