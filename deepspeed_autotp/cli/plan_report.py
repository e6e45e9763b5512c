# SPDX-License-Identifier: Apache-2.0
"""An estimate and a suggestion for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepspeed_autotp._core import Plan
from deepspeed_autotp.estimate.report import Collective, Estimate, RankMemory, Suggestion
from deepspeed_autotp.planning.plan_table import plan_table

_GIB = 2**30


def print_estimate(estimate: Estimate, plan: Plan, console: Console) -> None:
    """The plan, memory of every rank, collectives of a step, and warnings."""
    console.print(plan_table(plan))
    console.print(_memory(estimate))
    if estimate.activations.source == "none":
        console.print("activations and TP collectives are traced with --seq, such as --seq 4096")
    else:
        console.print(escape(_said(estimate)))
    if estimate.collectives:
        console.print(_collectives(estimate.collectives))
    for message in (*estimate.messages, *estimate.warnings):
        console.print(escape(message))


def print_suggestion(found: Suggestion, console: Console) -> None:
    """The layouts that fit, and how many do not."""
    table = Table(title=f"{found.gpus} GPUs with {found.memory / _GIB:.1f} GiB", box=SIMPLE_HEAD)
    for name in ("TP", "data-parallel", "ZeRO", "peak", "communication", "of a sequence"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for layout in found.layouts:
        table.add_row(
            str(layout.tp_size),
            str(layout.replicas),
            str(layout.zero_stage),
            f"{layout.peak / _GIB:.1f} GiB",
            _milliseconds(layout.communication_seconds),
            _milliseconds(layout.communication_seconds / layout.replicas),
            escape(layout.reason),
        )
    console.print(table)
    if not any(layout.fits for layout in found.layouts):
        console.print(
            "nothing fits: try more GPUs, a shorter --seq, --lora, or --gradient-checkpointing "
            "where it is not given yet"
        )
    for line in found.notes:
        console.print(escape(line))


def _memory(estimate: Estimate) -> Table:
    """A column for each TP rank, or one for all where they are alike."""
    settings = estimate.settings
    ranks = _different(estimate.ranks)
    table = Table(
        title=f"Memory of a rank: {settings.dtype}, {settings.optimizer}, ZeRO "
        f"{settings.zero_stage}, {settings.replicas} data-parallel",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("")
    for rank in ranks:
        name = f"rank {rank.rank}" if len(ranks) > 1 else "every rank"
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("parameters", *(f"{rank.elements:,}" for rank in ranks))
    if any(rank.trained_elements < rank.elements for rank in ranks):
        table.add_row("trained parameters", *(f"{rank.trained_elements:,}" for rank in ranks))
    table.add_section()
    _add_moment(table, "forward and backward", [rank.in_step for rank in ranks])
    _add_moment(table, "optimizer step", [rank.in_optimizer for rank in ranks])
    table.add_row("[bold]peak[/]", *(_size(rank.peak) for rank in ranks))
    return table


def _different(ranks: Sequence[RankMemory]) -> list[RankMemory]:
    """The first one alone where all hold as much."""
    alike = len({(rank.elements, rank.peak) for rank in ranks}) == 1
    return list(ranks[:1] if alike else ranks)


def _add_moment(table: Table, title: str, moments: Sequence[Mapping[str, int]]) -> None:
    table.add_row(f"[bold]{title}[/]", *(_size(sum(moment.values())) for moment in moments))
    for kind in moments[0]:
        if any(moment[kind] for moment in moments):
            sizes = (_size(moment[kind]) for moment in moments)
            table.add_row(f"  {kind.replace('_', ' ')}", *sizes)
    table.add_section()


def _said(estimate: Estimate) -> str:
    found = estimate.activations
    batch = f"{found.sequences} x {found.tokens} tokens"
    if found.source == "formula":
        return f"activations of {batch}: {found.reason}"
    return (
        f"traced on rank {found.rank} with {batch} ({found.blocks_traced} blocks, "
        f"{found.seconds:.1f} s): activations {_size(found.peak)}, of which "
        f"{_size(found.saved_for_backward)} are saved for the backward pass; logits "
        f"{_size(found.logits)}" + (f"; {found.reason}" if found.reason else "")
    )


def _collectives(collectives: Iterable[Collective]) -> Table:
    """One row for each kind, module and phase."""
    rows = list(collectives)
    timed = any(row.seconds is not None for row in rows)
    table = Table(title="Collectives of a step", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("collective", "between", "for", "in"):
        table.add_column(name, overflow="fold")
    for name in ("count", "each", "all"):
        table.add_column(name, justify="right", no_wrap=True)
    if timed:
        table.add_column("time", justify="right", no_wrap=True)
    for row in rows:
        between = f"{row.ranks} TP ranks" if row.between == "tp" else f"{row.ranks} replicas"
        cells = [row.kind, between, escape(row.module or "the loss"), row.phase]
        cells += [str(row.count), _size(row.size), _size(row.size * row.count)]
        table.add_row(*cells, *([_milliseconds(row.seconds or 0.0)] if timed else []))
    table.add_section()
    total = ["all", "", "", "", "", "", _size(sum(row.size * row.count for row in rows))]
    table.add_row(
        *total, *([_milliseconds(sum(row.seconds or 0.0 for row in rows))] if timed else [])
    )
    return table


def _size(size: int) -> str:
    for unit, name in ((_GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"
