# SPDX-License-Identifier: Apache-2.0
"""How the parameters of a checkpoint are sharded: what a plan says of them, and what a file keeps.

A layout knows nothing of the model. Those of parameters that are sharded alike are kept once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from deepspeed_autotp._core import Plan, reshard
from deepspeed_autotp.checkpoint.disk_memory import Empty, memory
from deepspeed_autotp.config.validation import problems

View = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Sharding:
    """``runs`` of each rank along the sharded dimension, as ``Entry.runs`` has them; where several
    ranks hold a run, the lowest is its owner. ``dim`` is the dimension that shrinks."""

    dim: int
    view: View
    runs: tuple[tuple[int, ...], ...]

    def width(self, rank: int) -> int:
        return sum(self.runs[rank][1::2])


@dataclass(frozen=True, slots=True)
class SavedParameter:
    """``sharding`` is None where every rank has the full tensor; ``tied_to`` names the parameter
    whose tensor this is."""

    name: str
    shape: tuple[int, ...]
    sharding: Sharding | None
    tied_to: str | None

    def local_shape(self, rank: int) -> tuple[int, ...]:
        if self.sharding is None:
            return self.shape
        local = list(self.shape)
        dim = self.sharding.dim
        local[dim] = local[dim] // self.sharding.view[1] * self.sharding.width(rank)
        return tuple(local)

    def numel(self, rank: int) -> int:
        """Elements of the shard on ``rank``."""
        return math.prod(self.local_shape(rank))


@dataclass(frozen=True, slots=True)
class Layout:
    """How the parameters of a model are laid over ``ranks``, by name."""

    ranks: int
    parameters: Mapping[str, SavedParameter]

    @staticmethod
    def of_plan(plan: Plan) -> Layout:
        """The layout that ``plan`` decided."""
        entries, shardings = plan.entries, dict[Sharding, Sharding]()
        parameters = {}
        for entry in entries:
            sharding = None
            if entry.is_sharded:
                runs = tuple(entry.runs(rank) for rank in range(plan.ranks))
                made = Sharding(entry.dim, entry.view, runs)
                sharding = shardings.setdefault(made, made)
            tied_to = entries[entry.tied_to].name if entry.is_tied else None
            parameters[entry.name] = SavedParameter(entry.name, entry.shape, sharding, tied_to)
        return Layout(plan.ranks, parameters)

    @property
    def ties(self) -> dict[str, str | None]:
        """By parameter the one whose tensor it is, where there is one."""
        return {name: parameter.tied_to for name, parameter in self.parameters.items()}

    def json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads, in JSON's types."""
        shardings = list(dict.fromkeys(p.sharding for p in self.parameters.values() if p.sharding))
        index = {sharding: place for place, sharding in enumerate(shardings)}
        return {
            "ranks": self.ranks,
            "shardings": [{"dim": s.dim, "view": s.view, "runs": s.runs} for s in shardings],
            "parameters": [
                [p.name, p.shape, index[p.sharding] if p.sharding else None, p.tied_to]
                for p in self.parameters.values()
            ],
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Layout:
        """ValueError where ``content`` is not what :meth:`json` gave of some layout."""
        try:
            saved = _SavedLayout.model_validate(content)
        except ValidationError as error:
            raise ValueError(problems(error)[0]) from None
        shardings = [Sharding(found.dim, found.view, found.runs) for found in saved.shardings]
        for index, each in enumerate(shardings):
            _check_sharding(f"shardings[{index}]", each, saved.ranks)
        parameters = {}
        for name, shape, at, tied_to in saved.parameters:
            if name in parameters or (at is not None and at >= len(shardings)):
                raise ValueError(f"parameters: got {name!r} twice, or with an unknown sharding")
            sharding = None if at is None else shardings[at]
            parameters[name] = SavedParameter(name, shape, sharding, tied_to)
        for parameter in parameters.values():
            _check_parameter(parameter, parameters)
        return Layout(saved.ranks, parameters)

    def difference(self, other: Layout) -> str | None:
        """What shows that ``other`` is of another model, whatever its size of TP; else None."""
        missing = [name for name in self.parameters if name not in other.parameters]
        unknown = [name for name in other.parameters if name not in self.parameters]
        for name in [*missing, *unknown]:
            return f"{name!r} is in one of them only"
        for name, mine in self.parameters.items():
            theirs = other.parameters[name]
            if mine.shape != theirs.shape:
                return f"{name!r} has the shape {list(mine.shape)} in it, {list(theirs.shape)} here"
            if mine.tied_to != theirs.tied_to:
                return f"{name!r} is tied to {mine.tied_to!r} in it, to {theirs.tied_to!r} here"
        return None


_Count = Annotated[int, Field(strict=True, ge=0, le=2**59)]
_Name = Annotated[str, Field(max_length=4096)]
_Shape = Annotated[tuple[_Count, ...], Field(max_length=64)]


class _SavedSharding(BaseModel):
    dim: _Count
    view: tuple[_Count, _Count, _Count]
    runs: tuple[tuple[_Count, ...], ...]


class _SavedLayout(BaseModel):
    """The JSON of a layout, which may be beside other keys."""

    ranks: Annotated[int, Field(strict=True, ge=1, le=2**20)]
    shardings: tuple[_SavedSharding, ...]
    parameters: tuple[tuple[_Name, _Shape, _Count | None, _Name | None], ...]


def _check_sharding(where: str, sharding: Sharding, ranks: int) -> None:
    """ValueError unless each rank has runs and each element is in one of them."""
    runs, size = sharding.runs, sharding.view[1]
    if len(runs) != ranks or any(len(own) % 2 for own in runs):
        raise ValueError(f"{where}.runs: expected pairs of start and length for {ranks} ranks")
    pairs = (pair for own in runs for pair in zip(own[::2], own[1::2], strict=True))
    end = 0
    for start, length in sorted(pairs):
        if start > end or length < 1:
            raise ValueError(f"{where}.runs: no rank has element {end} of {size}")
        end = max(end, start + length)
    if end != size or size < 1:
        raise ValueError(f"{where}.runs: got runs up to element {end}, expected {size}")


def _check_parameter(parameter: SavedParameter, others: Mapping[str, SavedParameter]) -> None:
    """ValueError where its sharding is of another shape, or it is tied to what is not alike."""
    sharding, shape, where = parameter.sharding, parameter.shape, repr(parameter.name)
    if math.prod(max(size, 1) for size in shape) > 2**59:
        raise ValueError(f"{where}: its shape has more elements than there can be")
    if sharding is not None and (
        sharding.dim >= len(shape)
        or math.prod(sharding.view) != math.prod(shape)
        or shape[sharding.dim] % sharding.view[1]
        or sharding.view[0] % math.prod(shape[: sharding.dim])
    ):
        raise ValueError(
            f"{where}: got the shape {list(shape)}, sharded along {sharding.dim} in the view "
            f"{list(sharding.view)}"
        )
    if parameter.tied_to is not None:
        other = others.get(parameter.tied_to)
        if other is None or (other.shape, other.sharding, other.tied_to) != (shape, sharding, None):
            raise ValueError(f"{where}: it is tied to {parameter.tied_to!r}, which is not alike")


def resharded(
    shards: Sequence[Callable[[], Tensor]],
    *,
    old: SavedParameter,
    new: SavedParameter,
    rank: int,
    empty: Empty = memory,
) -> Tensor:
    """The shard of ``new`` on ``rank``, made of the shards of ``old``.

    ``shards[r]()`` gives the shard of old rank r, of any shape; only those that are needed are
    asked for. ``empty`` gives memory to what is made; a replicated tensor is that of old rank 0.
    """
    either = new.sharding or old.sharding
    if either is None:
        return _shard(shards[0](), old, 0).reshape(new.shape)
    if old.sharding and new.sharding and old.sharding.view != new.sharding.view:
        # Cut along different dimensions: through the full tensor.
        full = SavedParameter(old.name, old.shape, None, None)
        whole = resharded(shards, old=old, new=full, rank=0)
        return resharded([lambda: whole], old=full, new=new, rank=rank, empty=empty)
    outer, size, inner = either.view
    everything = (0, size)
    sources = old.sharding.runs if old.sharding else (everything,)
    target = new.sharding.runs[rank] if new.sharding else everything
    made: Tensor | None = None
    opened: dict[int, Tensor] = {}
    for source, begin, to, length in reshard(sources, target):
        if source not in opened:
            opened[source] = _shard(shards[source](), old, source).reshape(outer, -1, inner)
        part = opened[source]
        if made is None:
            made = empty((outer, sum(target[1::2]), inner), part.dtype)
        made.narrow(1, to, length).copy_(part.narrow(1, begin, length))
    assert made is not None, "every rank has a run"
    return made.reshape(new.local_shape(rank))


def _shard(shard: Tensor, parameter: SavedParameter, rank: int) -> Tensor:
    """``shard`` as it is; ValueError where it has not the size of that of ``rank``."""
    if shard.numel() != parameter.numel(rank):
        raise ValueError(
            f"{parameter.name!r} has a shard of {shard.numel()} elements on TP rank {rank}, "
            f"expected {parameter.numel(rank)} of the shape {list(parameter.local_shape(rank))}; "
            "load another checkpoint"
        )
    return shard
