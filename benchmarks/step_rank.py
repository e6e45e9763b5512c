# SPDX-License-Identifier: Apache-2.0
"""What one rank of benchmarks/step.py does: train in one way, count, and measure.

It runs in a worker of the test pool, where a gloo group spans the ranks and a process has one
thread. The pool switches DeepSpeed's shared-memory all-reduce off; a training step of DeepSpeed
does not use it, only its inference does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.step_calls import GLOO, SHARED_MEMORY, Call, Recorder, removed
from benchmarks.step_ways import WAYS, Batch, Training

PHASES = ("forward", "backward", "update")
# Steps that learn, whose losses are compared. They warm everything up, too.
LEARNING_STEPS = 4


@dataclass(frozen=True, slots=True)
class Job:
    """``pairs`` is how many steps are timed with their collectives, and as many without;
    ``inspect`` asks for the collectives and the memory of a step."""

    way: str
    checkpoint: str
    rows: int
    sequence: int
    vocabulary: int
    pairs: int
    inspect: bool


@dataclass(frozen=True, slots=True)
class Inspected:
    """Collectives of a step by phase, and bytes: ``held`` by the parameters before the step, and
    the ``peak`` of what is alive during it."""

    calls: Mapping[str, list[Call]]
    held: int
    peak: int


@dataclass(frozen=True, slots=True)
class Times:
    """Of one step: seconds on the clock, and of processors in all threads of this rank.

    The latter change little with what else runs on the machine, and leave out all waiting.
    """

    seconds: float
    processor: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Whole steps, ``bare`` those without collectives."""

    losses: list[float]
    steps: list[Times]
    bare: list[Times]
    inspected: Inspected | None


def measure(job: Job) -> Measured:
    way = WAYS[job.way]
    training = way.build(job.checkpoint, job.rows)
    if not way.is_own and "deepspeed_autotp" in sys.modules:
        raise RuntimeError(f"{job.way} is to be measured without deepspeed_autotp in the process")
    batch = _batch(job)
    losses = [float(_step(training, batch)) for _ in range(LEARNING_STEPS)]
    # The steps from here on compute their update, and leave the weights as they are: without
    # collectives they would learn nonsense, whose figures may be slower to compute with.
    for group in training.optimizer.param_groups:
        group["lr"] = 0.0
    inspected = _inspect(training, batch) if job.inspect else None
    steps, bare = [], []
    for _ in range(job.pairs):
        steps.append(_timed(training, batch, bare=False))
        bare.append(_timed(training, batch, bare=True))
    return Measured(losses, steps, bare, inspected)


def _step(training: Training, batch: Batch) -> Tensor:
    loss = training.forward(batch)
    training.backward(loss)
    training.update()
    return loss.detach()


def _batch(job: Job) -> dict[str, Tensor]:
    """Tokens that are the same on every rank, for every way and in every step: the loss falls
    fast, and what is wrong in a gradient shows in it."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(job.vocabulary, (job.rows, job.sequence), generator=draw)
    return {"input_ids": tokens, "labels": tokens.clone()}


def _timed(training: Training, batch: Batch, *, bare: bool) -> Times:
    dist.barrier()
    with removed() if bare else nullcontext():
        began, worked = time.perf_counter(), time.process_time()
        _step(training, batch)
        return Times(time.perf_counter() - began, time.process_time() - worked)


def _inspect(training: Training, batch: Batch) -> Inspected:
    """Count in one step and measure memory in another, whose transport must show the same."""
    calls = _count(training, batch)
    held = _held(training.model)
    most, sent = _profiled(lambda: _step(training, batch))
    counted = sum(call.transport == GLOO for each in calls.values() for call in each)
    if sent != counted:
        raise RuntimeError(
            f"{counted} collectives were counted in a step and gloo carried {sent}: something "
            "slips by"
        )
    with removed():
        _, left = _profiled(lambda: _step(training, batch))
        remaining = _count(training, batch)
    left += sum(call.transport == SHARED_MEMORY for each in remaining.values() for call in each)
    if left:
        raise RuntimeError(f"{left} collectives run on when all are removed")
    return Inspected(calls, held, held + most)


def _count(training: Training, batch: Batch) -> dict[str, list[Call]]:
    recorders = {phase: Recorder() for phase in PHASES}
    with recorders["forward"]:
        loss = training.forward(batch)
    with recorders["backward"]:
        training.backward(loss)
    with recorders["update"]:
        training.update()
    return {phase: recorder.calls for phase, recorder in recorders.items()}


def _held(model: nn.Module) -> int:
    """Bytes of this rank's shards of the parameters, and of gradients that outlived a step."""
    shards = [_local(parameter) for parameter in model.parameters()]
    return sum(shard.nbytes for shard in shards) + sum(
        _local(parameter.grad).nbytes
        for parameter in model.parameters()
        if parameter.grad is not None
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _profiled(step: Callable[[], object]) -> tuple[int, int]:
    """The most bytes alive at once of those that a step allocates, and the collectives that
    gloo carried in it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = record.profiler.kineto_results.events()
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most, sum(event.name().startswith("gloo:") for event in events)
