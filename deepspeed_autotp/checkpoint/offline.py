# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of sharded runs, read and written by one process without ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepspeed_autotp.checkpoint.layout import Layout, SavedParameter, resharded
from deepspeed_autotp.checkpoint.metadata import (
    CONFIG_FILES,
    Metadata,
    read_metadata,
    write_layout,
)
from deepspeed_autotp.checkpoint.new_folder import new_folder
from deepspeed_autotp.checkpoint.resharded_states import ReshardedStates
from deepspeed_autotp.checkpoint.safetensors_file import Tensorlike, file_layout
from deepspeed_autotp.checkpoint.saved_checkpoint import MASTER, CheckpointFiles, SavedCheckpoint
from deepspeed_autotp.checkpoint.universal import universal_info

# What gives its items back, and shows how many of them are done.
Shown = Callable[[Sequence[str], str], Iterable[str]]


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


def checkpoint_folder(path: Path) -> Path:
    """The folder of a checkpoint: ``path``, or what the file ``latest`` in it names.

    ValueError where there is none.
    """
    latest = path / "latest"
    folder = path / latest.read_text(encoding="utf-8").strip() if latest.is_file() else path
    if any(folder.glob("*_model_states.pt")):
        return folder
    raise ValueError(
        f"{str(path)!r}: found no file *_model_states.pt, expected a checkpoint of DeepSpeed, or a "
        "folder of them with the file 'latest'; name one of them"
    )


def open_checkpoint(folder: Path) -> tuple[SavedCheckpoint, Metadata]:
    """A checkpoint that a sharded run has saved. ValueError where it is none, or not whole."""
    metadata = read_metadata(folder)
    if metadata is None or metadata.layout is None:
        version = "none" if metadata is None else f"version {metadata.version}"
        raise ValueError(
            f"{str(folder)!r}: tensor_parallel.json: got {version}, expected version 3 with the "
            "layout of the shards; load the checkpoint at the TP size it was saved at, and save it "
            "again"
        )
    files = CheckpointFiles(folder)
    return SavedCheckpoint(files, metadata.layout, groups=metadata.groups), metadata


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
    return resharded(shards, old=old, new=_full(old), rank=0)


def merge(
    folder: Path,
    out: Path,
    *,
    config: Path | None,
    master: bool,
    max_file_bytes: int,
    shown: Shown,
) -> None:
    """Write the full weights of a checkpoint as files that ``from_pretrained`` loads.

    ``config`` is a folder, or a file, with the configuration of the model where the checkpoint has
    none. One tensor is in memory at a time. ValueError where something is missing.
    """
    saved, _ = open_checkpoint(folder)
    tensors = list(_tensors(saved, master=master))
    files = _files(tensors, max_file_bytes)
    with new_folder(out) as made:
        for name, text in _config_texts(folder, config).items():
            (made / name).write_text(text, encoding="utf-8")
        names = iter(shown([t.name for t in tensors], "merge"))
        for file, members in files.items():
            layout = file_layout(list[Tensorlike](members), metadata={"format": "pt"})
            with open(made / file, "wb") as written:
                written.truncate(layout.size)
                written.write(layout.header)
                for tensor in members:
                    assert next(names) == tensor.name
                    weight = full_weight(saved, tensor.name, master=master).contiguous()
                    written.seek(layout.begins[tensor.name])
                    weight.reshape(-1).view(torch.uint8).numpy().tofile(written)
        if len(files) > 1:
            (made / "model.safetensors.index.json").write_text(_index(files), encoding="utf-8")
        next(names, None)


def reshard(folder: Path, out: Path, *, tp: int, replicas: int | None, shown: Shown) -> None:
    """Write a checkpoint as a run of TP size ``tp``, 1 or that of the checkpoint, would have saved
    it, into a folder of checkpoints ``out``.

    ValueError where something is missing, and for another TP size: how a model is sharded follows
    from the model, and ``load_checkpoint`` reshards while loading.
    """
    saved, metadata = open_checkpoint(folder)
    if tp not in (1, saved.layout.ranks):
        raise ValueError(
            f"--tp: got {tp}, expected 1 or {saved.layout.ranks}, the TP size of the checkpoint, "
            "as the shards of another size are known to the model alone; load the checkpoint "
            f"itself with autotp_size {tp}, which reshards while loading"
        )
    layout = saved.layout if tp > 1 else _unsharded(saved.layout)
    new_replicas = saved.replicas if replicas is None else replicas
    zero = saved.files.model(0)["ds_config"].get("zero_optimization", {})
    frozen = [
        p.name for p in layout.parameters.values() if (p.tied_to or p.name) not in saved.trained
    ]
    states = ReshardedStates(
        saved,
        layout,
        replicas=new_replicas,
        sub_group_size=int(zero.get("sub_group_size", 1e9)),
        universal_info=universal_info(layout, frozen=frozen) if tp > 1 else None,
    )
    with new_folder(out) as made:
        target = made / folder.name
        target.mkdir()
        ranks = [(rank, replica) for rank in range(tp) for replica in range(new_replicas)]
        places = dict(zip(map(str, ranks), ranks, strict=True))
        for place in shown(list(places), "reshard"):
            _write_rank(saved, states, target, *places[place])
        if tp > 1:
            write_layout(target, metadata)
        for name in CONFIG_FILES:
            if (folder / name).is_file():
                (target / name).write_bytes((folder / name).read_bytes())
        (made / "latest").write_text(folder.name, encoding="utf-8")


def _write_rank(
    saved: SavedCheckpoint, states: ReshardedStates, target: Path, rank: int, replica: int
) -> None:
    """Write the files of one rank."""
    files, kind = saved.files, saved.kind
    if replica == 0 or kind.is_stage3:
        torch.save(states.model(rank, replica), target / files.model_name(rank, replica))
    if kind.is_partitioned:
        made = {
            **files.optimizer_file(0, 0),
            "optimizer_state_dict": states.optimizer(rank, replica),
        }
        torch.save(made, target / files.optimizer_name(rank, replica))


def _full(parameter: SavedParameter) -> SavedParameter:
    return SavedParameter(parameter.name, parameter.shape, None, parameter.tied_to)


def _unsharded(layout: Layout) -> Layout:
    return Layout(1, {name: _full(parameter) for name, parameter in layout.parameters.items()})


def _tensors(saved: SavedCheckpoint, *, master: bool) -> Iterator[_Tensor]:
    """What is merged: parameters, tied ones once, and buffers."""
    module = saved.files.model(0)["module"]
    for name, value in module.items():
        if not isinstance(value, Tensor):
            continue
        parameter = saved.layout.parameters.get(name)
        if parameter is not None and parameter.tied_to is not None:
            continue
        shape = tuple(value.shape) if parameter is None else parameter.shape
        dtype = torch.float32 if master and saved.has_master(name) else value.dtype
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        yield _Tensor(name, shape, dtype, nbytes)


def _files(tensors: Sequence[_Tensor], most: int) -> dict[str, list[_Tensor]]:
    """The tensors by file, of at most ``most`` bytes where a tensor is not larger."""
    groups: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + tensor.nbytes > most:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {
        f"model-{index:05d}-of-{count:05d}.safetensors": group
        for index, group in enumerate(groups, 1)
    }


def _index(files: dict[str, list[_Tensor]]) -> str:
    total = sum(tensor.nbytes for group in files.values() for tensor in group)
    weight_map = {tensor.name: file for file, group in files.items() for tensor in group}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _config_texts(folder: Path, config: Path | None) -> dict[str, str]:
    """The configuration files of a merged model."""
    source = folder if config is None else config
    if source.is_file():
        return {"config.json": source.read_text(encoding="utf-8")}
    found = {
        name: (source / name).read_text(encoding="utf-8")
        for name in CONFIG_FILES
        if (source / name).is_file()
    }
    if "config.json" not in found:
        raise ValueError(
            f"{str(source)!r} has no config.json, expected the configuration of the model; name a "
            "folder that has it with --config"
        )
    return found
