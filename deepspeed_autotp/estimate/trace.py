# SPDX-License-Identifier: Apache-2.0
"""The activations and collectives of a step, traced on the sharded model without ranks or memory.

The model is converted as in a run, over a group that stands for one rank of many, and trains one
micro-batch on fake tensors. A model of many like blocks is traced with a few of them; their parts
are then repeated, so that the result is that of all.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from deepspeed_autotp import _core
from deepspeed_autotp._core import Plan
from deepspeed_autotp.base.printable import one_line
from deepspeed_autotp.estimate.stand_in_group import StandInGroup
from deepspeed_autotp.estimate.step_recorder import (
    Block,
    Call,
    Part,
    Step,
    StepRecorder,
    block_kind,
    stacks_of,
)
from deepspeed_autotp.estimate.trace_result import Collectives, Shape, Trace
from deepspeed_autotp.interop.fused_attention import fused_attention
from deepspeed_autotp.interop.labels import with_labels
from deepspeed_autotp.interop.live_bytes import fake_tensors, make_fake
from deepspeed_autotp.interop.transformers import model_facts, token_inputs
from deepspeed_autotp.planning.model_description import Description, describe
from deepspeed_autotp.self_check.inferred_inputs import inferred_inputs
from deepspeed_autotp.sharding.conversion import Conversion

# A model with more blocks than are needed to show all kinds is traced with these.
_MOST_BLOCKS = 16
# Blocks at each end that stand for themselves alone; the exact number first.
_MARGINS = (2, 1)
_LONGEST = 200  # of what a model says


# A model on the meta device, all of it or with a number of blocks in each stack.
Build = Callable[[int | None], nn.Module]


def trace_step(
    build: Build,
    plan_of: Callable[[Description], Plan | None],
    kinds: Mapping[str, Sequence[str]],
    *,
    rank: int,
    shape: Shape,
    on_gpu: bool = True,
) -> Trace:
    """Trace the step of ``rank``.

    plan_of  gives the plan of what ``build`` made; None: the model is not sharded
    kinds    of the blocks of each stack of the full model, by the name of its list
    on_gpu   attention is fused as on a GPU, and not as on a CPU

    ValueError saying why where it cannot be traced.
    """
    began = time.monotonic()
    for count, margin in _counts(kinds):
        small = _built(build, count)
        if small is None:
            break
        own = {name: [block_kind(block) for block in s] for name, s in stacks_of(small).items()}
        stands_for = _standing(kinds, own, margin)
        if stands_for is not None:
            step = _traced(small, plan_of, rank, shape, on_gpu)
            blocks = f"{sum(map(len, own.values()))} of {sum(map(len, kinds.values()))}"
            return _composed(step, _repeated(step.parts, stands_for), blocks, began)
    step = _traced(build(None), plan_of, rank, shape, on_gpu)
    return _composed(step, [(part, 1) for part in step.parts], "all", began)


def _counts(kinds: Mapping[str, Sequence[str]]) -> Iterator[tuple[int, int]]:
    """Numbers of first blocks in which all have one that stands for them, and with which margin."""
    longest = max(map(len, kinds.values()), default=0)
    for margin in _MARGINS:
        for count in range(1, min(_MOST_BLOCKS, longest - 1) + 1):
            first = {name: names[:count] for name, names in kinds.items()}
            if _standing(kinds, first, margin) is not None:
                yield count, margin


def _built(build: Build, count: int) -> nn.Module | None:
    try:
        return build(count)
    except Exception:  # whatever a class raises for a configuration that it does not take
        return None


def _standing(
    kinds: Mapping[str, Sequence[str]], own: Mapping[str, Sequence[str]], margin: int
) -> dict[str, list[int]] | None:
    """For each block of the full model the index of the one that stands for it; None where some
    have none.

    The first ``margin`` blocks stand for themselves, and so do the last, from the end. For one
    between stands one between that is of its kind, and with a margin of 2 among the same
    neighbours: what a block leaves to the next one is then counted exactly.
    """
    if list(kinds) != list(own):
        return None
    found = {}
    for name, names in kinds.items():
        there = own[name]
        if list(there) == list(names):
            found[name] = list(range(len(names)))
            continue
        if not 2 * margin < len(there) < len(names):
            return None
        ends = there[:margin] == names[:margin] and there[-margin:] == names[-margin:]
        inner = {_context(there, at, margin): at for at in range(margin, len(there) - margin)}
        wanted = [_context(names, at, margin) for at in range(margin, len(names) - margin)]
        if not ends or not set(wanted) <= set(inner):
            return None
        first, last = range(margin), range(len(there) - margin, len(there))
        found[name] = [*first, *(inner[each] for each in wanted), *last]
    return found


def _context(names: Sequence[str], at: int, margin: int) -> tuple[str, ...]:
    reach = margin - 1
    return tuple(names[at - reach : at + reach + 1])


def _traced(
    model: nn.Module,
    plan_of: Callable[[Description], Plan | None],
    rank: int,
    shape: Shape,
    on_gpu: bool,
) -> Step:
    """The step of a model on the meta device, which is used up. ValueError saying why not."""
    try:
        return _run(model, plan_of, rank, shape, on_gpu)
    except Exception as error:  # whatever a model raises on tensors without values
        raise ValueError(f"{type(error).__name__}: {one_line(error, longest=_LONGEST)}") from error


def _run(
    model: nn.Module,
    plan_of: Callable[[Description], Plan | None],
    rank: int,
    shape: Shape,
    on_gpu: bool,
) -> Step:
    description = describe(model)
    plan = plan_of(description)
    inputs = _inputs(model, shape)
    recorder = StepRecorder(model.train(), stacks_of(model), model_facts(model).output_head)
    group = None if plan is None else StandInGroup(rank, plan.ranks, recorder.sent)
    if plan is not None and group is not None:
        Conversion(description, plan=plan, group=group, overlap=True).commit()
    with fake_tensors(), fused_attention() if on_gpu else nullcontext():
        fake = make_fake(model)
        if plan is not None and group is not None:
            _switch(description, fake, plan, group)
        return recorder.run({key: _fake(value, shape) for key, value in inputs.items()})


def _switch(
    description: Description, fake: Mapping[int, nn.Parameter], plan: Plan, group: StandInGroup
) -> None:
    """As a conversion does once the tensors are shards: hooks go onto the fake parameters."""
    parameters = tuple(fake[id(parameter)] for parameter in description.parameters)
    switched = replace(description, parameters=parameters)
    conversion = Conversion(switched, plan=plan, group=group, overlap=True)
    conversion.switch()
    conversion.keep_logits()


def _inputs(model: nn.Module, shape: Shape) -> Mapping[str, object]:
    cpu = torch.device("cpu")
    values = token_inputs(model, device=cpu) or inferred_inputs(model, device=cpu)
    labelled = None if values is None else with_labels(model, values) or values
    if labelled is None:
        raise ValueError("the inputs of the model are not known")
    return labelled


def _fake(value: object, shape: Shape) -> object:
    """Of the shape of the micro-batch, where it is a batch of tokens or has a value for a row."""
    if not isinstance(value, Tensor):
        return value
    sizes = (shape.sequences, shape.tokens)[: value.dim()]
    return torch.empty(*sizes, *value.shape[2:], dtype=value.dtype, device="cpu")


def _repeated(
    parts: Sequence[Part], stands_for: Mapping[str, Sequence[int]]
) -> list[tuple[Part, int]]:
    """The parts of all blocks, and how often each comes."""
    by_block: dict[tuple[str, Block], Part] = {
        (part.phase, part.block): part for part in parts if part.block is not None
    }
    found: list[tuple[Part, int]] = []
    done: set[tuple[str, str]] = set()
    for part in parts:
        if part.block is None:
            found.append((part, 1))
            continue
        name = part.block[0]
        if (part.phase, name) in done:
            continue
        done.add((part.phase, name))
        order = stands_for[name] if part.phase == "forward" else reversed(stands_for[name])
        for index, run in itertools.groupby(order):
            found.append((by_block[part.phase, (name, index)], len(list(run))))
    return found


def _composed(step: Step, parts: Sequence[tuple[Part, int]], blocks: str, began: float) -> Trace:
    saved = step.saved
    if blocks != "all":
        there = sum(part.end[0] for part in step.parts if part.phase == "forward")
        every = sum(part.end[0] * n for part, n in parts if part.phase == "forward")
        saved += every - there
    calls: Counter[Call] = Counter()
    for part, repeats in parts:
        for call in part.calls:
            pattern = _core.index_pattern(call.module)
            key = Call(call.kind, call.size, call.ranks, pattern, call.phase)
            calls[key] += repeats
    return Trace(
        parts=tuple((part.end, part.moments, repeats) for part, repeats in parts),
        saved=saved,
        logits=step.logits,
        collectives=tuple(
            Collectives(c.kind, c.size, c.ranks, c.module, c.phase, n) for c, n in calls.items()
        ),
        blocks=blocks,
        seconds=time.monotonic() - began,
    )
