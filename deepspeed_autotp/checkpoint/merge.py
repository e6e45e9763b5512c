# SPDX-License-Identifier: Apache-2.0
"""The full weights of a checkpoint of shards, as files that ``from_pretrained`` loads."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed_autotp.checkpoint.layout import resharded
from deepspeed_autotp.checkpoint.model_config import config_texts
from deepspeed_autotp.checkpoint.new_folder import new_folder
from deepspeed_autotp.checkpoint.open_checkpoint import open_checkpoint
from deepspeed_autotp.checkpoint.pretrained_folder import INDEX, SINGLE, Index
from deepspeed_autotp.checkpoint.rank_files import as_saved
from deepspeed_autotp.checkpoint.safetensors_file import Tensorlike, file_layout
from deepspeed_autotp.checkpoint.saved_checkpoint import (
    MASTER,
    SavedCheckpoint,
    refuse_undescribed,
)
from deepspeed_autotp.checkpoint.unsharded import full
from deepspeed_autotp.checkpoint.worker_processes import (
    Advance,
    Progress,
    Work,
    default_jobs,
    do_all,
)


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    tensors: tuple[_Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def merge(
    folder: Path,
    out: Path,
    *,
    config: Path | None,
    master: bool,
    max_file_bytes: int,
    jobs: int | None,
    progress: Progress,
) -> None:
    """Write the full weights of a checkpoint as files that ``from_pretrained`` loads.

    ``config`` is a folder, or a file, with the configuration of the model, where it is not that
    beside the checkpoint; ``jobs`` the number of processes, or None for a default. One tensor is in
    the memory of each at a time. ValueError where something is missing.
    """
    saved, _ = open_checkpoint(folder)
    if master and saved.groups is None and saved.kind.name != "torch":
        raise ValueError(
            f"--master: {str(folder)!r} does not name the parameters of its optimizer, expected "
            "one of ZeRO or of a sharded run; leave out --master, which gives the weights in 16 "
            "bits"
        )
    with as_saved(folder):
        files = _files(list(_tensors(saved, master=master)), max_file_bytes)
    total = sum(file.nbytes for file in files)
    configs = _config_texts(folder, config)
    with new_folder(out) as made, progress(total, "merge", "B") as done:
        for name, text in configs.items():
            (made / name).write_text(text, encoding="utf-8")
        start = partial(_start, folder, made, master=master)
        count = default_jobs(total) if jobs is None else jobs
        do_all(start, files, jobs=count, done=done)
        if len(files) > 1:
            (made / INDEX).write_text(_index(files), encoding="utf-8")


def full_weight(saved: SavedCheckpoint, name: str, *, master: bool = False) -> Tensor:
    """The full weight of a parameter, or a buffer; the float32 one of the optimizer with
    ``master`` where it has one."""
    old = saved.layout.parameters.get(name)
    if old is None:
        buffer: Tensor = saved.files.model(0)["module"][name]
        return buffer
    known = old.tied_to or name
    if master and saved.has_master(known):
        shards = saved.state_shards(known, MASTER)
    else:
        shards = saved.weight_shards(name)
    return resharded(shards, old=old, new=full(old), rank=0)


def _start(folder: Path, made: Path, *, master: bool) -> Work[_File]:
    """What writes a file into ``made``."""
    saved, _ = open_checkpoint(folder)
    return partial(_write, saved, made, master=master)


def _write(saved: SavedCheckpoint, made: Path, file: _File, done: Advance, *, master: bool) -> None:
    layout = file_layout(list[Tensorlike](file.tensors), metadata={"format": "pt"})
    with open(made / file.name, "wb") as written:
        os.posix_fallocate(written.fileno(), 0, layout.size)  # or an error that says so
        written.write(layout.header)
        for tensor in file.tensors:
            with as_saved(saved.files.folder):
                weight = full_weight(saved, tensor.name, master=master).contiguous()
                assert (weight.shape, weight.dtype) == (tensor.shape, tensor.dtype), tensor.name
            written.seek(layout.begins[tensor.name])
            weight.reshape(-1).view(torch.uint8).numpy().tofile(written)
            done(tensor.nbytes)


def _tensors(saved: SavedCheckpoint, *, master: bool) -> Iterator[_Tensor]:
    """What is merged: parameters, tied ones once, and buffers."""
    module = saved.files.model(0)["module"]
    _refuse_other_names(saved, module)
    for name, value in module.items():
        if not isinstance(value, Tensor):
            continue
        parameter = saved.layout.parameters.get(name)
        if parameter is not None and parameter.tied_to is not None:
            continue
        shape = tuple(value.shape) if parameter is None else parameter.shape
        yield _Tensor(
            name, shape, torch.float32 if master and saved.has_master(name) else value.dtype
        )


def _refuse_other_names(saved: SavedCheckpoint, module: Mapping[str, Any]) -> None:
    """ValueError where the files have not the weights of the model that was sharded."""
    where, parameters = repr(str(saved.files.folder)), saved.layout.parameters
    refuse_undescribed(saved, module)
    missing = next((n for n, p in parameters.items() if p.tied_to is None and n not in module), "")
    if missing:
        raise ValueError(
            f"{where} has no {missing!r}, as save_checkpoint(exclude_frozen_parameters=True) saves "
            "it; save the checkpoint with all parameters"
        )
    if any(".base_layer." in name for name in parameters):
        raise ValueError(
            f"{where} is of a model with adapters, expected one without; load it, and call "
            "deepspeed_autotp.save_pretrained on all ranks, which writes the adapters"
        )


def _files(tensors: Sequence[_Tensor], most: int) -> list[_File]:
    """The files, of at most ``most`` bytes where a tensor is not larger."""
    groups: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + tensor.nbytes > most:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return [_File(SINGLE, tuple(groups[0]))]
    count = len(groups)
    return [
        _File(f"model-{index:05d}-of-{count:05d}.safetensors", tuple(group))
        for index, group in enumerate(groups, 1)
    ]


def _index(files: Sequence[_File]) -> str:
    index = Index(
        sum(math.prod(tensor.shape) for file in files for tensor in file.tensors),
        sum(file.nbytes for file in files),
        {file.name: [tensor.name for tensor in file.tensors] for file in files},
    )
    return index.text({file.name: file.name for file in files})


def _config_texts(folder: Path, config: Path | None) -> Mapping[str, str]:
    """The configuration files of a merged model."""
    found = config_texts(folder, config)
    if "config.json" not in found:
        raise ValueError(
            f"{str(folder)!r} has no config.json, expected the configuration of the model; name a "
            "folder that has it with --config"
        )
    return found
