# SPDX-License-Identifier: Apache-2.0
"""A file in each of DeepSpeed's checkpoints that says how its weights are sharded.

It is read before loading. A rank loads the file of its own TP rank where the layout is the same
one. Another layout has other weights in its files, of the same shapes even, as of a fused weight
under another ``shape``; they are resharded, see resume.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from deepspeed_autotp._core import Plan
from deepspeed_autotp.base.printable import printable
from deepspeed_autotp.checkpoint.atomic_folder import write_atomically
from deepspeed_autotp.checkpoint.layout import Layout
from deepspeed_autotp.config.json_text import read_json
from deepspeed_autotp.config.validation import problems, wrong

NAME = "tensor_parallel.json"
# Of the model, beside the metadata.
CONFIG_FILES = ("config.json", "generation_config.json")
# 1: the hash of the layout, by Python. 2: by the core. 3: the layout itself, and the names of the
# optimizer's parameters. 4: what the plan was made from. 5: that there are experts in other files.
_VERSION = 5
_WITHOUT_EXPERTS = 4  # so that earlier versions of this package load them
_FIRST_WITH_LAYOUT = 3
_LARGEST = 100_000_000
_WRITTEN_BY = "an earlier deepspeed-autotp"
Experts = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Metadata:
    """``layout`` is None before version 3; ``groups`` are the names of the optimizer's parameters
    by parameter group. ``recipe`` is what the plan was made from (planning/plan_recipe.py), or None
    before version 4 and where that cannot be written. ``experts`` says over how many ranks
    DeepSpeed's AutoEP has split them, and how many data-parallel replicas there are."""

    version: int
    ranks: int
    layout_hash: str
    layout: Layout | None
    groups: tuple[tuple[str, ...], ...] | None
    recipe: Mapping[str, Any] | None = None
    written_by: str = _WRITTEN_BY
    experts: Experts | None = None

    def has_layout_of(self, plan: Plan) -> bool:
        """Whether a rank of ``plan`` has the shard that its file holds."""
        mine = _first_hash(plan) if self.version == 1 else plan.layout_hash
        return self.ranks == plan.ranks and self.layout_hash == mine


def write_metadata(
    folder: Path,
    plan: Plan,
    groups: Sequence[Sequence[str]] | None = None,
    *,
    configs: Mapping[str, str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    experts: Experts | None = None,
) -> None:
    """Write the metadata of ``plan`` into ``folder``, which is made where it is missing; beside it
    ``configs``, the texts of the model's configuration by file, of CONFIG_FILES. ``recipe`` is what
    the plan was made from, and ``experts`` as in the metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    known = tuple(map(tuple, groups)) if groups is not None else None
    write_layout(folder, replace(metadata_of(plan, recipe), groups=known, experts=experts))
    for name, text in (configs or {}).items():
        write_atomically(folder / name, text.encode())


def metadata_of(plan: Plan, recipe: Mapping[str, Any] | None) -> Metadata:
    """The metadata of ``plan``, which ``recipe`` was made into, without the optimizer."""
    layout = Layout.of_plan(plan)
    return Metadata(_WITHOUT_EXPERTS, plan.ranks, plan.layout_hash, layout, None, recipe)


def write_layout(folder: Path, metadata: Metadata) -> None:
    """Write ``metadata``, which has a layout, into ``folder``."""
    assert metadata.layout is not None
    content = {
        "version": _WITHOUT_EXPERTS if metadata.experts is None else _VERSION,
        "written_by": f"deepspeed-autotp {version('deepspeed-autotp')}",
        "layout": metadata.layout_hash,
        "groups": metadata.groups,
        "recipe": metadata.recipe,
        **({} if metadata.experts is None else {"experts": metadata.experts}),
        **metadata.layout.json(),
    }
    write_atomically(folder / NAME, json.dumps(content, separators=(",", ":")).encode())


def read_metadata(folder: Path, *, experts: Experts | None = None) -> Metadata | None:
    """The metadata in ``folder``, or None without. ValueError for a later version, for what cannot
    be read, and for other ``experts`` than these."""
    try:
        content = read_json(Path(folder, NAME), largest=_LARGEST)
        number = _version(content)
        found = _parsed(content, number) if number <= _VERSION else None
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(
            f"{str(folder / NAME)!r} cannot be read, expected what save_checkpoint wrote: "
            f"{printable(str(error))}; load another checkpoint"
        ) from error
    if found is not None:
        refuse_other_experts(folder, found.experts, experts)
        return found
    raise ValueError(
        f"the checkpoint {str(folder)!r} has metadata of version {number}, expected at most "
        f"{_VERSION}; load it with the version of deepspeed-autotp that saved it, or load full "
        "weights, as save_16bit_model writes them, before the model is sharded"
    )


def check_metadata(folder: Path, metadata: Metadata | None, plan: Plan, *, rank: int) -> None:
    """ValueError where the weights in ``folder`` are sharded otherwise than by ``plan``, and its
    ``metadata`` does not say how.

    Without metadata, as in a checkpoint of full weights or of DeepSpeed's own sharding, it is
    known only whether there are weights for ``rank``.
    """
    if metadata is None:
        _check_weights(folder, rank=rank)
    elif not metadata.has_layout_of(plan) and metadata.layout is None:
        refuse_unknown_layout(folder, metadata, ranks=plan.ranks)


def refuse_unknown_layout(folder: Path, metadata: Metadata, *, ranks: int) -> None:
    """ValueError for metadata that does not say how the weights are sharded."""
    if metadata.ranks != ranks:
        raise ValueError(
            f"the checkpoint {str(folder)!r} was saved at TP size {metadata.ranks}, but the TP "
            f"size of this model is {ranks}; load it with autotp_size {metadata.ranks}, or "
            "load full weights, as save_16bit_model writes them, before the model is sharded"
        )
    raise ValueError(
        f"the checkpoint {str(folder)!r} holds weights that were sharded by other rules; load "
        "it into the same model with the same tensor_parallel section, or load full weights, "
        "as save_16bit_model writes them, before the model is sharded"
    )


class _Saved(BaseModel):
    """The JSON of metadata of any version, but for that of its layout."""

    ranks: Annotated[int, Field(strict=True, ge=1)]
    layout: str
    groups: tuple[tuple[str, ...], ...] | None = None
    recipe: dict[str, Any] | None = None
    written_by: str = _WRITTEN_BY
    experts: Experts | None = None


def _version(content: Any) -> int:
    if not isinstance(content, dict):
        raise ValueError(f"got {type(content).__name__}, expected a JSON object")
    number = content.get("version", 1)
    if type(number) is not int or number < 1:
        raise ValueError(f"version: {wrong(number, 'an integer of at least 1')}")
    return number


def _parsed(content: dict[str, Any], number: int) -> Metadata:
    try:
        saved = _Saved.model_validate(content)
    except ValidationError as error:
        raise ValueError(problems(error)[0]) from None
    layout = Layout.from_json(content) if number >= _FIRST_WITH_LAYOUT else None
    names = [name for group in saved.groups or () for name in group]
    unknown = layout is not None and set(names) - set(layout.parameters)
    if len(set(names)) < len(names) or (unknown and saved.experts is None):
        raise ValueError("groups: got a parameter twice, or one that parameters does not list")
    return Metadata(
        number,
        saved.ranks,
        saved.layout,
        layout,
        saved.groups,
        saved.recipe,
        saved.written_by,
        saved.experts,
    )


def refuse_other_experts(folder: Path, found: Experts | None, expected: Experts | None) -> None:
    """ValueError unless the experts that a checkpoint was saved with are those of this run."""
    if found != expected:
        raise ValueError(
            f"the checkpoint {str(folder)!r} was saved {_words(found)}, expected "
            f"{_words(expected)}: experts that it has split are not resharded; load it with the "
            "expert_parallel section and the number of ranks that it was saved with, or load full "
            "weights, as save_16bit_model writes them, before the model is sharded"
        )


def _words(experts: Experts | None) -> str:
    if experts is None:
        return "without DeepSpeed's AutoEP"
    size, replicas = experts
    return f"with DeepSpeed's AutoEP over {size} ranks and {replicas} data-parallel replicas"


def _check_weights(folder: Path, *, rank: int) -> None:
    if any(folder.glob("*mp_rank_*")) and not any(folder.glob(f"*mp_rank_{rank:02d}_*")):
        raise ValueError(
            f"the checkpoint {str(folder)!r} holds no weights for TP rank {rank}: it was saved at "
            "a smaller TP size, or unsharded; load it with that autotp_size, or load full weights "
            "before the model is sharded"
        )


def _first_hash(plan: Plan) -> str:
    """The hash of a layout in metadata without a version."""
    digest = hashlib.blake2b(digest_size=16)
    for entry in plan.entries:
        runs = [entry.runs(rank) for rank in range(plan.ranks)]
        digest.update(f"{entry.name} {list(entry.shape)} {entry.view} {runs}\n".encode())
    return digest.hexdigest()
