# SPDX-License-Identifier: Apache-2.0
"""A few training steps of a model, and what of them can be compared with those of another run.

SGD behind a clipped gradient norm: an error of a gradient stays as large as it is, where an
optimizer that divides by its size would make rounding of what vanishes an error of all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from deepspeed_autotp.interop.torch_private import backward
from deepspeed_autotp.planning.model_description import Description
from deepspeed_autotp.self_check.inputs import Inputs
from deepspeed_autotp.self_check.isolation import fix_rng, isolated
from deepspeed_autotp.self_check.precision import rounded_otherwise
from deepspeed_autotp.self_check.trace import Output, Run, Trace
from deepspeed_autotp.self_check.without_randomness import WithoutRandomness

LEARNING_RATE = 0.1
MOST_NORM = 1.0

# Clips the gradients of a model in place; their norm before.
Clip = Callable[[nn.Module, float], Tensor]


@dataclass(slots=True)
class Training:
    """``first`` is the run of the first step: outputs of all modules that were asked for, and
    gradients before clipping by the index of the parameter. ``losses`` and ``norms``, of the
    gradient, have one value for each step; ``weights`` are those afterwards."""

    first: Run = field(default_factory=Run)
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def first_with(self, exits: Collection[str]) -> Run:
        """``first`` as a trace with these exits would have seen it."""
        outputs: list[Output] = []
        since: list[str] = []
        for output in self.first.outputs:
            since += output.since
            if output.module in exits:
                outputs.append(replace(output, since=tuple(since)))
                since = []
        return replace(self.first, outputs=outputs, ran=[*since, *self.first.ran])


def clip_full(model: nn.Module, most: float) -> Tensor:
    """Clip the gradients of a model that is not sharded."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), most)


def train(
    description: Description,
    inputs: Inputs,
    *,
    steps: int,
    clip: Clip = clip_full,
    unseen: Collection[str] = (),
    otherwise: bool = False,
    done: Callable[[int], object] = lambda _: None,
) -> Training:
    """Train a model for ``steps`` steps on ``inputs``, without what is random; its weights change.

    ``unseen`` modules keep no output; ``otherwise``: it is rounded otherwise, as a run that shows
    what rounding does in 16 bits. ``done`` is told of each step. Raises what the model raises.
    """
    model = description.modules[""]
    device = description.parameters[0].device
    trained = [p for p in description.parameters if p.requires_grad]
    optimizer = torch.optim.SGD(dict.fromkeys(trained), lr=LEARNING_RATE)
    labelled = inputs.labelled is not None
    values = inputs.labelled if inputs.labelled is not None else inputs.values
    result = Training()
    with isolated(model, device), rounded_otherwise(model) if otherwise else nullcontext():
        for step in range(steps):
            seen = set(description.modules) - set(unseen) if step == 0 else ()
            trace = Trace(description.modules, exits=seen)
            fix_rng(device)
            with torch.enable_grad(), WithoutRandomness(trace.drawn), trace:
                objective = trace.objective(model(**values), labelled=labelled)
                backward(objective)
            if step == 0:
                result.first = trace.run
                result.first.gradients = _gradients(description)
            result.losses.append(objective.detach().double())
            result.norms.append(clip(model, MOST_NORM).detach().double())
            optimizer.step()
            optimizer.zero_grad()
            done(1)
    result.weights = [p.detach().clone() for p in description.parameters]
    return result


def _gradients(description: Description) -> dict[int, Tensor]:
    return {
        index: p.grad.detach().clone()
        for index, p in enumerate(description.parameters)
        if p.grad is not None
    }
