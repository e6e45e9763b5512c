# SPDX-License-Identifier: Apache-2.0
"""Memory of every rank and collectives of a step, from a plan and a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed_autotp import _core
from deepspeed_autotp._core import Kind, Plan
from deepspeed_autotp.estimate.formula import formula_activations
from deepspeed_autotp.estimate.parameters import rows_of, stacks_of_rows, warnings_of
from deepspeed_autotp.estimate.report import (
    Activations,
    Collective,
    Estimate,
    RankMemory,
    Settings,
)
from deepspeed_autotp.estimate.subject import Subject
from deepspeed_autotp.estimate.trace_result import Shape, Trace
from deepspeed_autotp.planning.plan_words import bytes_of_ranks


@dataclass(frozen=True, slots=True)
class Request:
    """What to estimate for. ``zero`` has options of the section zero_optimization; ``bandwidth`` is
    in bytes per second. ``accumulates``: a step has several micro-batches. ``left_out`` are keys of
    the configuration that would change the memory, and are not counted."""

    replicas: int
    stage: int
    optimizer: str
    shape: Shape | None
    bandwidth: float | None
    checkpointing: bool
    lora: str | None
    zero: Mapping[str, Any]
    accumulates: bool = False
    left_out: tuple[str, ...] = ()


# By TP size: a trace, or why there is none.
Traces = dict[int, Trace | str]


class Estimator:
    """Estimates of one model; a trace is made once for a TP size."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._traces: Traces = {}

    def estimate(self, ranks: int, request: Request) -> Estimate:
        """For a TP size of ``ranks``. ValueError where nothing can be sharded."""
        subject = self._subject
        plan = subject.plan(ranks) or subject.unsharded()
        traced_rank = largest_rank(plan)
        trace = None if request.shape is None else self._trace(ranks, traced_rank, request.shape)
        activations = self._activations(trace, plan, traced_rank, request)
        memory = [_memory(plan, rank, subject.record.trains, request) for rank in range(ranks)]
        rows = rows_of(plan, subject.record)
        return Estimate(
            model=subject.text,
            tp_size=ranks,
            settings=_settings(subject, request),
            bytes=sum(row.bytes for row in rows),
            bytes_per_rank=tuple(bytes_of_ranks(plan.table())),
            parameters=rows,
            stacks=stacks_of_rows(subject.stacks(), plan),
            ranks=tuple(
                _rank_memory(rank, found, trace, activations, accumulates=request.accumulates)
                for rank, found in enumerate(memory)
            ),
            activations=activations,
            collectives=(
                *_tp_collectives(trace, request.bandwidth),
                *_replica_collectives(memory[traced_rank], request),
            ),
            warnings=(*warnings_of(plan), *_not_counted(request)),
            messages=tuple(plan.messages),
        )

    def _trace(self, ranks: int, rank: int, shape: Shape) -> Trace | str:
        if ranks not in self._traces:
            # Only who traces waits for torch.
            from deepspeed_autotp.estimate.trace import trace_step

            subject = self._subject
            try:
                found: Trace | str = trace_step(
                    subject.build,
                    lambda description: subject.plan_of(description, ranks),
                    subject.stacks(),
                    rank=rank,
                    shape=shape,
                )
            except ValueError as error:
                found = str(error)
            self._traces[ranks] = found
        return self._traces[ranks]

    def _activations(
        self, trace: Trace | str | None, plan: Plan, rank: int, request: Request
    ) -> Activations:
        shape = request.shape
        if shape is None:
            return Activations("none", "no --seq was given", rank, 0, 0, 0, 0, 0, "none", 0.0)
        if isinstance(trace, Trace):
            peak, _ = trace.peak(0.0)
            sizes = (peak, trace.saved, trace.logits)
            return Activations(
                "traced", _assumed(plan), rank, shape.sequences, shape.tokens, *sizes, trace.blocks,
                round(trace.seconds, 3),
            )  # fmt: skip
        found = formula_activations(
            self._subject.record, plan.ranks, shape, checkpointing=request.checkpointing
        )
        reason = f"the step cannot be traced ({trace}); by {found.source}"
        sizes = (found.saved + found.logits, found.saved, found.logits)
        return Activations(
            "formula", reason, rank, shape.sequences, shape.tokens, *sizes, "none", 0.0
        )


def _assumed(plan: Plan) -> str:
    """What a trace takes for granted."""
    even = any(layer.kind is Kind.WHOLE_EXPERTS for layer in plan.layers)
    return "tokens are taken to name all experts equally often" if even else ""


def largest_rank(plan: Plan) -> int:
    """The TP rank that holds most parameters, the first of equal ones."""
    held = bytes_of_ranks(plan.table())
    return held.index(max(held))


def _settings(subject: Subject, request: Request) -> Settings:
    return Settings(
        replicas=request.replicas,
        zero_stage=request.stage,
        optimizer=request.optimizer,
        dtype=subject.record.dtype[0],
        gradient_checkpointing=request.checkpointing,
        lora=request.lora,
        bandwidth=request.bandwidth,
    )


def _memory(plan: Plan, rank: int, trains: Sequence[bool], request: Request) -> dict[str, Any]:
    return plan.rank_memory(
        rank,
        stage=request.stage,
        replicas=request.replicas,
        states=_core.optimizer_states(request.optimizer),
        trains=trains,
        **request.zero,
    )


def _not_counted(request: Request) -> Iterator[str]:
    if request.accumulates and request.shape is not None:
        yield "collectives are those of one of the micro-batches of a step"
    if request.left_out:
        yield f"not counted of the configuration: {', '.join(request.left_out)}"


def _rank_memory(
    rank: int,
    memory: Mapping[str, Any],
    trace: Trace | str | None,
    activations: Activations,
    *,
    accumulates: bool,
) -> RankMemory:
    """The moments of a rank. Gradients grow while activations go, where they are not there from
    the start, as those of an earlier micro-batch are: the trace says when the sum is largest."""
    live, gradients = activations.peak, memory["gradients"]
    grow = memory["trained"] > 0 and memory["share"] > 0 and not accumulates
    if isinstance(trace, Trace) and grow:
        live, there = trace.peak(memory["share"])
        gradients = min(gradients, round(memory["share"] * there))
    held = {
        "parameters": memory["parameters"],
        "gathered_parameters": memory["gathered"],
        "master_weights": memory["master"],
        "optimizer_states": memory["states"],
    }
    buffers = memory["buckets"]
    in_step = {
        **held,
        "gradients": gradients,
        "communication_buffers": buffers,
        "activations": live,
    }
    in_optimizer = {
        **held,
        "gradients": memory["gradients"],
        "communication_buffers": memory["kept_buckets"],
        "optimizer_step": memory["step"],
    }
    return RankMemory(
        rank=rank,
        elements=memory["elements"],
        trained_elements=memory["trained"],
        after_backward={**held, "gradients": memory["gradients"]},
        in_step=in_step,
        in_optimizer=in_optimizer,
        peak=max(sum(in_step.values()), sum(in_optimizer.values())),
    )


def _tp_collectives(trace: Trace | str | None, bandwidth: float | None) -> Iterator[Collective]:
    if isinstance(trace, Trace):
        for each in trace.collectives:
            seconds = _seconds(each.kind, each.size, each.ranks, bandwidth)
            yield Collective(
                kind=each.kind,
                between="tp",
                ranks=each.ranks,
                module=each.module,
                phase=each.phase,
                count=each.count,
                size=each.size,
                seconds=None if seconds is None else seconds * each.count,
            )


def _replica_collectives(memory: Mapping[str, Any], request: Request) -> Iterator[Collective]:
    for kind, size, purpose in memory["traffic"]:
        yield Collective(
            kind=kind,
            between="replicas",
            ranks=request.replicas,
            module=purpose,
            phase="step",
            count=1,
            size=size,
            seconds=_seconds(kind, size, request.replicas, request.bandwidth),
        )


def _seconds(kind: str, size: int, ranks: int, bandwidth: float | None) -> float | None:
    return None if bandwidth is None else _core.collective_seconds(kind, size, ranks, bandwidth)
