# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds: for people and as JSON. Reads no tensor."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from deepspeed_autotp.checkpoint.metadata import read_metadata
from deepspeed_autotp.checkpoint.open_checkpoint import checkpoint_folder, open_checkpoint
from deepspeed_autotp.checkpoint.rank_files import CheckpointFiles, as_saved
from deepspeed_autotp.checkpoint.unsharded import is_unsharded


@dataclass(frozen=True, slots=True)
class Summary:
    """``problem`` says why a checkpoint cannot be resharded; what is not known then is None.
    ``model`` is the class of transformers whose plan can be made for any TP size without ranks.

    ``parameters`` counts elements, tied ones once.
    """

    folder: str
    written_by: str
    deepspeed: str | None
    model: str | None
    tp_size: int | None
    replicas: int | None
    optimizer: str | None
    states: tuple[str, ...]
    dtype: str | None
    parameters: int | None
    sharded: int | None
    steps: int | None
    samples: int | None
    files: int
    nbytes: int
    problem: str | None

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def summarize(path: Path) -> Summary:
    """The summary of the checkpoint in ``path``, or of the latest of those in it.

    ValueError where there is none.
    """
    folder = checkpoint_folder(path)
    found = [file for file in folder.iterdir() if file.is_file()]
    facts = _Facts()
    problem = None
    try:
        with as_saved(folder):
            facts = _facts(folder)
    except ValueError as error:
        problem = str(error)
    return Summary(
        folder=str(folder),
        written_by=_written_by(folder),
        files=len(found),
        nbytes=sum(file.stat().st_size for file in found),
        problem=problem,
        **asdict(facts),
    )


@dataclass(frozen=True, slots=True)
class _Facts:
    deepspeed: str | None = None
    model: str | None = None
    tp_size: int | None = None
    replicas: int | None = None
    optimizer: str | None = None
    states: tuple[str, ...] = ()
    dtype: str | None = None
    parameters: int | None = None
    sharded: int | None = None
    steps: int | None = None
    samples: int | None = None


def _facts(folder: Path) -> _Facts:
    """ValueError where something is missing; every file is opened, so that one that was cut off
    shows."""
    saved, metadata = open_checkpoint(folder)
    model = saved.files.model(0)
    for rank in range(saved.layout.ranks):
        for replica in range(saved.replicas):
            saved.files.model(rank, replica if saved.files.is_stage3 else 0)
            if saved.kind.is_partitioned:
                saved.files.optimizer(rank, replica)
    own = [p for p in saved.layout.parameters.values() if p.tied_to is None]
    dtypes = (value.dtype for value in model["module"].values() if isinstance(value, Tensor))
    name = ((metadata.recipe if metadata else None) or {}).get("model")
    return _Facts(
        deepspeed=str(model["ds_version"]),
        model=None if name is None else str(name),
        tp_size=saved.layout.ranks,
        replicas=saved.replicas,
        optimizer=saved.kind.words,
        states=tuple(map(str, saved.state(0, 0, 0))),
        dtype=str(next(dtypes, None)).removeprefix("torch."),
        parameters=sum(math.prod(p.shape) for p in own),
        sharded=sum(math.prod(p.shape) for p in own if p.sharding is not None),
        steps=int(model["global_steps"]),
        samples=int(model["global_samples"]),
    )


def _written_by(folder: Path) -> str:
    try:
        metadata = read_metadata(folder)
        if metadata is None:
            with as_saved(folder):
                is_plain = is_unsharded(CheckpointFiles(folder))
            return "DeepSpeed" if is_plain else "DeepSpeed, by its own rules"
    except (ValueError, OSError):
        return "not known"
    return metadata.written_by
