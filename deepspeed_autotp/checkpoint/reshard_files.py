# SPDX-License-Identifier: Apache-2.0
"""A checkpoint written anew, as a run of another size would have saved it, without ranks."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed_autotp.checkpoint.disk_memory import DiskMemory
from deepspeed_autotp.checkpoint.layout import Layout
from deepspeed_autotp.checkpoint.layout_at_size import layouts_at
from deepspeed_autotp.checkpoint.metadata import read_metadata, write_layout
from deepspeed_autotp.checkpoint.model_config import config_texts
from deepspeed_autotp.checkpoint.new_folder import new_folder
from deepspeed_autotp.checkpoint.rank_files import CheckpointFiles, as_saved
from deepspeed_autotp.checkpoint.resharded_states import ReshardedStates
from deepspeed_autotp.checkpoint.saved_checkpoint import SavedCheckpoint
from deepspeed_autotp.checkpoint.universal import universal_info
from deepspeed_autotp.checkpoint.worker_processes import (
    Advance,
    Progress,
    Work,
    default_jobs,
    do_all,
)
from deepspeed_autotp.interop.deepspeed.checkpoints import write_recovery_scripts

# What DeepSpeed puts beside its checkpoints.
_SCRIPTS = "zero_to_*.py"
# A TP rank and a data-parallel one.
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Resharding:
    """What every process has to know."""

    folder: Path
    old: Layout
    new: Layout
    groups: Sequence[Sequence[str]] | None
    replicas: int | None

    def opened(self) -> SavedCheckpoint:
        return SavedCheckpoint(CheckpointFiles(self.folder), self.old, groups=self.groups)

    def states(self, saved: SavedCheckpoint, on_disk: DiskMemory | None = None) -> ReshardedStates:
        """ValueError where the checkpoint cannot be resharded."""
        zero = saved.files.model(0)["ds_config"].get("zero_optimization", {})
        parameters = self.new.parameters.values()
        frozen = [p.name for p in parameters if (p.tied_to or p.name) not in saved.trained]
        more: dict[str, Any] = {} if on_disk is None else {"empty": on_disk.empty}
        return ReshardedStates(
            saved,
            self.new,
            replicas=self.replicas or saved.replicas,
            sub_group_size=int(zero.get("sub_group_size", 1e9)),
            universal_info=universal_info(self.new, frozen=frozen) if self.new.ranks > 1 else None,
            **more,
        )


def reshard(
    folder: Path,
    out: Path,
    *,
    tp: int,
    replicas: int | None,
    config: Path | None,
    jobs: int | None,
    progress: Progress,
) -> None:
    """Write a checkpoint as a run of TP size ``tp`` and ``replicas`` data-parallel ranks, or as
    many as it has, would have saved it, into a folder of checkpoints ``out``.

    ``config`` is a folder, or a file, with the configuration of the model, where it is not that
    beside the checkpoint;
    ``jobs`` the number of processes, or None for a default. Each has one tensor in its memory at a
    time. ValueError where something is missing.
    """
    metadata = read_metadata(folder)
    with as_saved(folder):
        sizes = layouts_at(folder, metadata, tp=tp, config=config)
        groups = None if metadata is None else metadata.groups
        task = _Resharding(folder, sizes.old, sizes.new, groups, replicas)
        saved = task.opened()
        states = task.states(saved)
    configs = config_texts(folder, config)
    nbytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    copies = range(replicas or saved.replicas)
    places = [(rank, replica) for rank in range(tp) for replica in copies]
    with new_folder(out) as made, progress(len(places), "reshard", "rank") as done:
        target = made / folder.name
        target.mkdir()
        count = default_jobs(nbytes) if jobs is None else jobs
        do_all(partial(_start, task, target), places, jobs=count, done=done)
        if sizes.metadata is not None:
            write_layout(target, replace(sizes.metadata, groups=states.groups))
        for name, text in configs.items():
            (target / name).write_text(text, encoding="utf-8")
        if any(folder.parent.glob(_SCRIPTS)):
            write_recovery_scripts(made, sharded=tp > 1)
        (made / "latest").write_text(folder.name, encoding="utf-8")


def _start(task: _Resharding, target: Path) -> Work[Place]:
    """What writes the files of a rank into ``target``."""
    return partial(_write_rank, task, task.opened(), target)


def _write_rank(
    task: _Resharding, saved: SavedCheckpoint, target: Path, place: Place, done: Advance
) -> None:
    files, kind = saved.files, saved.kind
    on_disk = DiskMemory(target)
    with as_saved(files.folder):
        states = task.states(saved, on_disk)
    if place[1] == 0 or kind.is_stage3:
        with as_saved(files.folder):
            made = _compact(states.model(*place), on_disk)
            made["ds_config"] = _with_size(made["ds_config"], task.new.ranks)
        _save(made, target / files.model_name(*place))
    if kind.is_partitioned:
        with as_saved(files.folder):
            made = dict(files.optimizer_file(0, 0))
            made["optimizer_state_dict"] = states.optimizer(*place)
            made["ds_config"] = _with_size(made["ds_config"], task.new.ranks)
        _save(made, target / files.optimizer_name(*place))
    done(1)


def _compact(states: dict[str, Any], on_disk: DiskMemory) -> dict[str, Any]:
    """``states`` without weights that are a part of a larger tensor, all of which would be saved:
    replicated ones are as they were read, and DeepSpeed has all weights in one."""
    copies: dict[int, Tensor] = {}

    def alone(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.untyped_storage().nbytes() == value.nbytes:
            return value
        if id(value) not in copies:  # tied ones are the same
            copies[id(value)] = on_disk.empty(value.shape, value.dtype).copy_(value)
        return copies[id(value)]

    made = dict(states)
    for key in ("module", "frozen_param_fragments"):
        if states[key]:
            made[key] = type(states[key])((name, alone(t)) for name, t in states[key].items())
    return made


def _with_size(config: Mapping[str, Any], tp: int) -> dict[str, Any]:
    """The configuration of a run of TP size ``tp``; its batch sizes are those of the saved run."""
    section = {**config.get("tensor_parallel", {}), "autotp_size": tp, "tp": {"tp_size": tp}}
    return {**config, "tensor_parallel": section}


def _save(states: Mapping[str, Any], file: Path) -> None:
    try:
        torch.save(states, file)
    except RuntimeError as error:  # the only one of torch's writer, which does not say why
        free = shutil.disk_usage(file.parent).free
        raise OSError(
            f"{file.name} could not be written: {error}; {free} bytes are free on the disk"
        ) from error
