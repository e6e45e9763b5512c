# SPDX-License-Identifier: Apache-2.0
"""A layout as DeepSpeed's universal checkpoints describe it: by affine maps.

``ds_to_universal`` makes full tensors of shards by them, and loading a universal checkpoint takes
shards out of full tensors (deepspeed/checkpoint/affine.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from deepspeed_autotp.checkpoint.layout import Layout, SavedParameter, Sharding

_VERSION = 0.4
_AFFINE_VERSION = 1
# What is in the names of weights with a row for each token, for DeepSpeed.
_VOCABULARY = ("embed", "lm_head")
_FROZEN = (
    "it does not train, and DeepSpeed restores no such parameter; load the checkpoint itself, at "
    "any TP size"
)
_SPLIT = (
    "AutoEP has split it beside tensor parallelism, which no test compares; load the checkpoint "
    "itself, at the sizes it was saved at"
)


def universal_info(
    layout: Layout, *, frozen: Collection[str] = (), experts: Collection[str] = ()
) -> dict[str, Any]:
    """What a checkpoint says of all its parameters.

    A universal checkpoint holds the parameters of the optimizer alone: with ``frozen`` ones, and
    with modules ``experts`` that AutoEP has split, ``ds_to_universal`` refuses it, in our words.
    """
    own = [p for p in layout.parameters.values() if p.tied_to is None]
    return {
        "universal_checkpoint_version": _VERSION,
        **_categories([p for p in own if p.name not in frozen]),
        "affine_map": {
            "version": _AFFINE_VERSION,
            "params": {
                _pattern(p.name): _affine_map(p, layout.ranks) for p in own if p.name not in frozen
            },
        },
        "autotp_unsupported_parameter_patterns": {
            **{_pattern(name): _FROZEN for name in frozen},
            **{_pattern(name): _SPLIT for name in experts},
        },
    }


def _categories(parameters: Sequence[SavedParameter]) -> dict[str, Any]:
    """What readers ask for that know no affine maps. A weight that is no plain concatenation of
    its shards is in none: only its map describes it."""
    plain = {p.name: p.sharding.dim for p in parameters if p.sharding and _is_plain(p)}
    rows = [p for p in parameters if plain.get(p.name) == 1 and len(p.shape) == 2]
    tables = [p for p in parameters if plain.get(p.name) == 0 and len(p.shape) == 2]
    tables = [p for p in tables if any(part in p.name for part in _VOCABULARY)]
    size = tables[0].shape[0] if tables else None
    found: dict[str, Any] = {
        "parameter_with_row_parallelism_patterns": sorted(_pattern(p.name) for p in rows),
        "tp_replicated_parameter_patterns": sorted(
            _pattern(p.name) for p in parameters if p.sharding is None
        ),
        "vocabulary_parameter_patterns": sorted(
            _pattern(p.name) for p in tables if p.shape[0] == size
        ),
    }
    return found if size is None else {**found, "original_vocab_size": size}


def _is_plain(parameter: SavedParameter) -> bool:
    """Whether the shards in rank order make the full tensor."""
    sharding = parameter.sharding
    assert sharding is not None
    joined = [pair for rank in range(len(sharding.runs)) for pair in _pairs(sharding, rank)]
    ends = [0, *(start + length for start, length in joined)]
    starts = [start for start, _ in joined]
    inner = math.prod(parameter.shape[sharding.dim + 1 :])
    in_order = starts == ends[:-1] and ends[-1] == sharding.view[1]
    return in_order and sharding.view[1:] == (parameter.shape[sharding.dim], inner)


def parameter_meta(parameter: SavedParameter, ranks: int) -> Mapping[str, Any]:
    """What a parameter of a sharded model carries, by which its shard is taken out."""
    return {
        "universal_checkpoint_version": _VERSION,
        "conversion": {"affine_map": _affine_map(parameter, ranks)},
    }


def _pattern(name: str) -> str:
    return f"^{re.escape(name)}$"


def _affine_map(parameter: SavedParameter, ranks: int) -> dict[str, Any]:
    return {
        "logical_shape": list(parameter.shape),
        "ranks": {
            rank: {
                "shard_shape": list(parameter.local_shape(rank)),
                "pieces": list(_pieces(parameter, rank, ranks)),
            }
            for rank in range(ranks)
        },
    }


def _pieces(parameter: SavedParameter, rank: int, ranks: int) -> Iterator[dict[str, Any]]:
    """The runs of a shard as arguments of ``torch.as_strided`` on both sides."""
    everyone = list(range(ranks))
    sharding = parameter.sharding
    if sharding is None:
        numel = parameter.numel(0)
        yield _piece([numel], (0, [1]), (0, [1]), everyone)
        return
    outer, size, inner = sharding.view
    width, offset = sharding.width(rank), 0
    for start, length in _pairs(sharding, rank):
        yield _piece(
            [outer, length, inner],
            (start * inner, [size * inner, inner, 1]),
            (offset * inner, [width * inner, inner, 1]),
            [r for r in everyone if (start, length) in _pairs(sharding, r)],
        )
        offset += length


def _pairs(sharding: Sharding, rank: int) -> list[tuple[int, int]]:
    runs = sharding.runs[rank]
    return list(zip(runs[::2], runs[1::2], strict=True))


def _piece(
    shape: list[int],
    source: tuple[int, list[int]],
    dest: tuple[int, list[int]],
    locations: list[int],
) -> dict[str, Any]:
    return {
        "shape": shape,
        "source": [source[0], source[1]],
        "dest": [dest[0], dest[1]],
        "locations": locations,
    }
