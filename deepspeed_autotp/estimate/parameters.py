# SPDX-License-Identifier: Apache-2.0
"""The parameters of a plan as rows, the blocks they are in, and what to warn of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from deepspeed_autotp._core import Entry, Kind, Plan, index_pattern
from deepspeed_autotp.estimate.model_record import ModelRecord, class_of_kind
from deepspeed_autotp.estimate.report import BlockKind, Row, Stack

# Of names in a warning.
_NAMED = 4


def rows_of(plan: Plan, record: ModelRecord) -> tuple[Row, ...]:
    """One row for each group of parameters, as the plan's table has them."""
    rows = []
    for row in plan.table():
        entry = row.entry
        *_, dtype, _, _ = record.data.parameters[row.index]
        rows.append(
            Row(
                pattern=row.pattern,
                count=row.count,
                kind=str(entry.kind),
                source=str(entry.source),
                rule=entry.rule,
                dtype=dtype,
                trains=record.trains[row.index],
                shape=entry.shape,
                local_shapes=_local_shapes(entry, plan),
                bytes=row.full_bytes,
                bytes_per_rank=tuple(row.local_bytes),
            )
        )
    return tuple(rows)


def stacks_of_rows(stacks: Mapping[str, Sequence[str]], plan: Plan) -> tuple[Stack, ...]:
    """``stacks`` has the kinds of the blocks of each list, by the name of the list."""
    return tuple(
        Stack(name, len(kinds), tuple(_kinds(name, kinds, plan))) for name, kinds in stacks.items()
    )


def _kinds(name: str, kinds: Sequence[str], plan: Plan) -> Iterator[BlockKind]:
    for kind in dict.fromkeys(kinds):
        first = kinds.index(kind)
        inside = f"{name}.{first}."
        patterns = [
            index_pattern(entry.name) for entry in plan.entries if entry.name.startswith(inside)
        ]
        yield BlockKind(
            class_of_kind(kind), first, kinds.count(kind), tuple(dict.fromkeys(patterns))
        )


def warnings_of(plan: Plan) -> Iterator[str]:
    """What of a plan costs memory or balance, in sentences."""
    if plan.skips_all:
        yield "the rules skip all of the model: every rank holds and computes all of it"
        return
    if plan.ranks == 1:
        return
    warning = plan.replicated_warning()
    if warning is not None:
        yield warning
    uneven, shared = [], []
    for row in plan.table():
        entry = row.entry
        if not entry.is_sharded:
            continue
        widths = [shape[entry.dim] for shape in _local_shapes(entry, plan)]
        if sum(widths) > entry.shape[entry.dim]:
            shared.append(row.pattern)
        elif len(set(widths)) > 1:
            sizes = "|".join(map(str, dict.fromkeys(widths)))
            what = "the vocabulary of " if entry.kind is Kind.VOCABULARY else ""
            uneven.append(f"{what}{row.pattern} ({entry.shape[entry.dim]} as {sizes})")
    if uneven:
        yield (
            "uneven shards, with which ranks wait for the largest, and collectives are padded to "
            f"it: {_listed(uneven)}"
        )
    if shared:
        yield (
            "several ranks hold the same runs, as there are fewer key/value heads than ranks, and "
            f"sum their gradients: {_listed(shared)}"
        )


def _local_shapes(entry: Entry, plan: Plan) -> tuple[tuple[int, ...], ...]:
    return tuple(entry.local_shape(rank) for rank in range(plan.ranks))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
