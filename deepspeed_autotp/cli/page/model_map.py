# SPDX-License-Identifier: Apache-2.0
"""The map of a model: its parameters in groups, one for blocks that are alike, drawn as areas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from deepspeed_autotp._core import Entry, Plan, index_pattern
from deepspeed_autotp.cli.page.areas import Box, Strips, divided, strips_of, with_gap
from deepspeed_autotp.estimate.model_record import class_of_kind

# (width, height) in pixels of a picture that stands for all of the model, for wide and narrow
# windows. Pictures of one kind have the same bytes per area.
_WIDE, _NARROW = (720.0, 400.0), (330.0, 440.0)
GLYPH = Box(0.0, 0.0, 40.0, 28.0)
# Of a picture at least, and of a cell that is drawn.
_LEAST, _SEEN = 14.0, 3.0
# Of the names of modules that a title has.
_NAMED = 3
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Cell:
    """A weight in a picture; ``row`` is that of the estimate, ``label`` what has room."""

    row: int
    box: Box
    label: str
    strips: tuple[Strips, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """The weights of a group as areas; ``left_out`` are too small to be seen."""

    width: float
    height: float
    cells: tuple[Cell, ...]
    left_out: int


@dataclass(frozen=True, slots=True)
class Member:
    """Parameters of a row that are in one group. Bytes are those of all of them; ``tied_to`` is
    the parameter that the first of them is, or empty."""

    row: int
    name: str
    tied_to: str
    count: int
    bytes: int
    bytes_per_rank: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks that are alike, or neighbours that are in no block (``blocks`` is 0); ``at`` counts
    groups."""

    at: int
    title: str
    place: str
    blocks: int
    bytes: int
    bytes_per_rank: tuple[int, ...]
    members: tuple[Member, ...]
    wide: Picture
    narrow: Picture


@dataclass(slots=True)
class _Found:
    """A group while parameters are put into it; ``rows`` counts them by row."""

    stack: str
    kind: str
    rows: dict[int, int] = field(default_factory=dict)


def groups_of(plan: Plan, stacks: Mapping[str, Sequence[str]]) -> tuple[Group, ...]:
    """The groups, in the order of the model.

    ``stacks`` has the kinds of the blocks of each list, by the name of the list.
    """
    rows = list(plan.table())
    entries = [row.entry for row in rows]
    total = max(1, sum(row.full_bytes for row in rows))
    made = []
    for at, found in enumerate(_sorted_into(plan, stacks)):
        members = []
        for row, count in found.rows.items():
            one = rows[row]
            held = tuple(size * count // one.count for size in one.local_bytes)
            full = one.full_bytes * count // one.count
            name = _name(one.pattern, found.stack)
            tied = plan.entries[one.entry.tied_to].name if one.entry.is_tied else ""
            members.append(Member(row, name, tied, count, full, held))
        title, place, blocks = _titles(found, stacks, members)
        wide, narrow = (_picture(members, entries, plan, total, most) for most in (_WIDE, _NARROW))
        made.append(
            Group(
                at=at,
                title=title,
                place=place,
                blocks=blocks,
                bytes=sum(member.bytes for member in members),
                bytes_per_rank=_sums(members, plan.ranks),
                members=tuple(members),
                wide=wide,
                narrow=narrow,
            )
        )
    return tuple(made)


def glyphs_of(plan: Plan) -> list[tuple[Strips, ...]]:
    """The shards of each row of the plan's table in GLYPH."""
    return [strips_of(row.entry, plan.ranks, GLYPH) for row in plan.table()]


def _sorted_into(plan: Plan, stacks: Mapping[str, Sequence[str]]) -> Iterable[_Found]:
    """Every parameter once; those of blocks of a kind come together where the first one is."""
    places = {_key(row.entry, plan.ranks): at for at, row in enumerate(plan.table())}
    blocks: dict[tuple[str, str], _Found] = {}
    found: list[_Found] = []
    for entry in plan.entries:
        stack, kind = _block_of(entry.name, stacks)
        if stack:
            group = blocks.get((stack, kind))
            if group is None:
                group = blocks[stack, kind] = _Found(stack, kind)
                found.append(group)
        elif not found or found[-1].stack:
            found.append(_Found("", ""))
            group = found[-1]
        else:
            group = found[-1]
        row = places[_key(entry, plan.ranks)]
        group.rows[row] = group.rows.get(row, 0) + 1
    return found


def _block_of(name: str, stacks: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    for stack, kinds in stacks.items():
        if name.startswith(f"{stack}."):
            index = name[len(stack) + 1 :].partition(".")[0]
            return stack, kinds[int(index)]
    return "", ""


def _key(entry: Entry, ranks: int) -> tuple[object, ...]:
    """What the entries of a row of the plan's table have in common."""
    runs = tuple(entry.runs(rank) for rank in range(ranks))
    what = (entry.kind, entry.source, entry.rule, entry.dim, entry.is_tied)
    return (index_pattern(entry.name), *what, entry.shape, entry.view, runs)


def _name(pattern: str, stack: str) -> str:
    """A pattern without what all of its group have."""
    return pattern.removeprefix(f"{index_pattern(stack)}.*.") if stack else pattern


def _titles(
    found: _Found, stacks: Mapping[str, Sequence[str]], members: Sequence[Member]
) -> tuple[str, str, int]:
    """What the group is, where, and of how many blocks."""
    if found.stack:
        kinds = stacks[found.stack]
        blocks, first = kinds.count(found.kind), kinds.index(found.kind)
        where = "" if blocks == len(kinds) else f", {blocks} of {len(kinds)}, the first is {first}"
        return class_of_kind(found.kind), f"{found.stack}{where}", blocks
    modules = dict.fromkeys(_module(member.name) for member in members)
    names = list(modules)[:_NAMED]
    more = f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else ""
    return ", ".join(names) + more, "outside of the blocks", 0


def _module(name: str) -> str:
    """The last word of the module of a parameter, or the parameter where it has none."""
    module = name.rpartition(".")[0]
    return module.rpartition(".")[2] or name


def _sums(members: Sequence[Member], ranks: int) -> tuple[int, ...]:
    return tuple(sum(member.bytes_per_rank[rank] for member in members) for rank in range(ranks))


def _picture(
    members: Sequence[Member],
    entries: Sequence[Entry],
    plan: Plan,
    total: int,
    most: tuple[float, float],
) -> Picture:
    """``most`` is the picture that would stand for ``total`` bytes."""
    size = sum(member.bytes for member in members)
    area = most[0] * most[1] * size / total
    # As wide as all where there is much, and a square where there is little.
    width = max(_LEAST, min(most[0], math.sqrt(area * max(1.0, 2.5 * size / total))))
    height = max(_LEAST, area / width)
    cells = tuple(_cells(members, entries, plan, Box(0.0, 0.0, width, height)))
    there = sum(1 for member in members if member.bytes > 0)
    return Picture(width, height, cells, there - len(cells))


def _cells(
    members: Sequence[Member], entries: Sequence[Entry], plan: Plan, room: Box
) -> Iterator[Cell]:
    boxes = divided(room, [member.bytes for member in members])
    for member, box in zip(members, boxes, strict=True):
        if member.bytes == 0 or min(box.width, box.height) < _SEEN:
            continue
        cell = with_gap(box)
        yield Cell(
            row=member.row,
            box=cell,
            label=_label(member.name, cell),
            strips=strips_of(entries[member.row], plan.ranks, cell),
        )


def _label(name: str, cell: Box) -> str:
    """As many of the last words of a name as have room, in letters of about 7 by 12 pixels."""
    words = name.removesuffix(_WEIGHT).split(".")
    for start in range(len(words)):
        text = ".".join(words[start:])
        if words[start] != "*" and len(text) * 7 + 8 <= cell.width and cell.height >= 16:
            return text
    return ""
