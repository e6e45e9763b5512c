# SPDX-License-Identifier: Apache-2.0
"""A plan in words: one line of what was sharded and what was not, and why for each parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.filesize import decimal

from deepspeed_autotp._core import Entry, Kind, Plan, Row, Source, index_pattern

_NAMED = 3
# Why no rule shards a parameter: as the heading of a group, and as a sentence.
_VECTOR = ("norms and biases", "a norm, bias or scale that belongs to no sharded layer")
_NO_RULE = ("no rule", "no rule of the configuration, the model or a known block shards it")


def report_line(
    plan: Plan, *, replicated: Sequence[str] = (), replaced_later: Sequence[str] = ()
) -> str:
    """What is sharded by whom, what stays replicated and why, and the bytes of a rank.

    ``replicated`` names the modules that the self-check found to differ, as in a PlanRequest, but
    for those that are ``replaced_later``, as in a Description.
    """
    rows = [row for row in plan.table() if not row.entry.is_tied]
    sharded: dict[str, int] = {}
    kept: dict[str, list[Row]] = {}
    for row in rows:
        if row.entry.is_sharded:
            source = str(row.entry.source)
            sharded[source] = sharded.get(source, 0) + row.count
        else:
            kept.setdefault(_heading(row, replicated, replaced_later), []).append(row)
    full = sum(row.full_bytes for row in rows)
    ranks = bytes_of_ranks(rows)
    by = ", ".join(f"{count} by {source}" for source, count in sharded.items()) or "none"
    return (
        f"{sum(sharded.values())} parameters sharded over {plan.ranks} ranks ({by}); "
        f"replicated {_replicated(kept, full)}; {_per_rank(ranks, full)}"
    )


def bytes_of_ranks(rows: Iterable[Row]) -> list[int]:
    """What each rank holds of all ``rows`` of a plan."""
    return [sum(sizes) for sizes in zip(*(row.local_bytes for row in rows), strict=True)]


def _heading(row: Row, replicated: Sequence[str], replaced_later: Sequence[str]) -> str:
    """The reason by which replicated parameters are grouped."""
    entry = row.entry
    for names, why in (
        (replaced_later, "replaced by DeepSpeed's AutoEP"),
        (replicated, "differed in the self-check"),
    ):
        if any(f"{row.pattern}.".startswith(f"{index_pattern(name)}.") for name in names):
            return why
    if entry.kind is Kind.SKIPPED or (entry.rule and entry.source is not Source.NONE):
        return f"by {entry.source}"
    return _without_rule(entry)[0]


def _without_rule(entry: Entry) -> tuple[str, str]:
    return _VECTOR if len(entry.shape) <= 1 else _NO_RULE


def _replicated(kept: dict[str, list[Row]], full: int) -> str:
    if not kept:
        return "nothing"
    parts = []
    for why, rows in kept.items():
        size = sum(row.full_bytes for row in rows)
        largest = sorted(rows, key=lambda row: -row.full_bytes)
        names = ", ".join(row.pattern for row in largest[:_NAMED])
        more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
        named = "" if why == _VECTOR[0] else f": {names}{more}"
        parts.append(f"{decimal(size)} ({why}{named})")
    share = sum(row.full_bytes for rows in kept.values() for row in rows) / max(1, full)
    return f"{', '.join(parts)}, {100 * share:.1f} % of the model"


def _per_rank(ranks: Sequence[int], full: int) -> str:
    most, least = max(ranks), min(ranks)
    shares = f"{most / max(1, full):.3f}"
    sizes = decimal(most)
    if least != most:
        sizes = f"{decimal(least)} to {sizes}"
        shares = f"{least / max(1, full):.3f} to {shares}"
    return f"each rank holds {sizes} of {decimal(full)} ({shares} of the model)"


def decisions(plan: Plan) -> Iterator[str]:
    """One line for each pattern of names: what was decided, by whom, and its shapes."""
    for row in plan.table():
        words = dict(explanation(plan, row.entry))
        name = row.pattern + (f" x{row.count}" if row.count > 1 else "")
        words.pop("parameter")
        yield f"{name}: " + "; ".join(f"{title} {text}" for title, text in words.items())


def explanation(plan: Plan, entry: Entry) -> Iterator[tuple[str, str]]:
    """What was decided on one parameter: titles and words."""
    yield "parameter", entry.name
    yield "kind", str(entry.kind)
    yield "decided by", "no rule" if entry.source is Source.NONE else str(entry.source)
    if entry.rule:
        yield "rule", entry.rule
    if entry.is_tied:
        yield "tied to", plan.entries[entry.tied_to].name
    if why := _reason(entry):
        yield "reason", why
    yield "full shape", str(list(entry.shape))
    for rank in range(plan.ranks):
        yield f"rank {rank}", f"{list(entry.local_shape(rank))}{_span(entry, rank)}"
    module = entry.name.rpartition(".")[0]
    for integer in plan.integers:
        if module == integer.module or module.startswith(f"{integer.module}."):
            yield f"{integer.module}.{integer.key}", f"{integer.full}, local {list(integer.values)}"


def _reason(entry: Entry) -> str:
    """Why every rank has all of a parameter; "" for one that is sharded."""
    if entry.is_sharded or entry.kind is Kind.SKIPPED:
        return ""
    why = "a rule or the self-check replicates it" if entry.rule else _without_rule(entry)[1]
    summed = "; its gradient is summed over the ranks, since each uses it for a part of its work"
    return why + (summed if entry.kind is Kind.REPLICATED_SUM else "")


def _span(entry: Entry, rank: int) -> str:
    """Where the shard of ``rank`` is in the full parameter."""
    if not entry.is_sharded:
        return ""
    width = entry.local_shape(rank)[entry.dim]
    spans = [f"{at} to {at + n - 1}" for _, at, n, _ in entry.chunks(rank, 0, width)]
    return f", {', '.join(spans) or 'nothing'} of {entry.shape[entry.dim]} along dim {entry.dim}"
