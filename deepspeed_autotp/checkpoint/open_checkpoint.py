# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of sharded runs, found and opened by one process without ranks."""

from __future__ import annotations

from pathlib import Path

from deepspeed_autotp.checkpoint.metadata import Metadata, read_metadata
from deepspeed_autotp.checkpoint.rank_files import CheckpointFiles, as_saved
from deepspeed_autotp.checkpoint.saved_checkpoint import SavedCheckpoint
from deepspeed_autotp.checkpoint.unsharded import is_unsharded, layout_of_files, ties_of_files
from deepspeed_autotp.interop.deepspeed.checkpoints import latest_name

_STATES = "*_model_states.pt"
_LATEST = "latest"
# What from_pretrained looks for.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def checkpoint_folder(path: Path) -> Path:
    """The folder of a checkpoint: ``path``, or what the file ``latest`` in it names.

    ValueError where there is none.
    """
    path = path.resolve()
    latest = path / _LATEST
    folder = path / latest_name(latest) if latest.is_file() else path
    if any(folder.glob(_STATES)):
        return folder
    expected = "a checkpoint of DeepSpeed, or a folder of them with the file 'latest'"
    raise ValueError(f"{str(path)!r} {_found(path, folder)}, expected {expected}; {_remedy(path)}")


def _found(path: Path, folder: Path) -> str:
    """What ``path`` is, where ``folder``, which is meant, has no files of a checkpoint."""
    if not path.exists():
        return "does not exist"
    if not path.is_dir():
        return "is a file"
    if folder != path:
        return f"names {folder.name!r} in its file 'latest', where no file {_STATES} is"
    return f"has no file {_STATES}"


def _remedy(path: Path) -> str:
    """What to name in the place of ``path``."""
    if not path.exists():
        return "correct the path"
    if path.is_file():
        return f"name its folder, {str(path.parent)!r}"
    saved = [each.parent for each in path.glob("checkpoint-*/latest")]
    if saved:
        last = max(saved, key=lambda each: (len(each.name), each.name))
        return f"it is the folder of a Trainer: name one of its checkpoints, such as {str(last)!r}"
    weights = [name for name in _WEIGHTS if (path / name).is_file()]
    if weights:
        return f"with its {weights[0]} it is what from_pretrained loads as it is, at any TP size"
    if (path / ".metadata").is_file():
        return "with its .metadata torch.distributed.checkpoint.load loads it, at any TP size"
    return "name one of them"


def open_checkpoint(folder: Path) -> tuple[SavedCheckpoint, Metadata | None]:
    """A checkpoint that a sharded run has saved, or, without metadata, one of TP size 1.

    ValueError where it is neither, or not whole.
    """
    files, metadata = CheckpointFiles(folder), read_metadata(folder)
    with as_saved(folder):
        if metadata is not None and metadata.layout is not None:
            return SavedCheckpoint(files, metadata.layout, groups=metadata.groups), metadata
        if metadata is None and is_unsharded(files):
            layout = layout_of_files(files, ties_of_files(files))
            return SavedCheckpoint(files, layout, groups=None), None
    version = "none" if metadata is None else f"version {metadata.version}"
    raise ValueError(
        f"{str(folder)!r}: tensor_parallel.json: got {version}, expected version 3 or later "
        "with the layout of the shards; load the checkpoint at the TP size it was saved at, "
        "and save it again"
    )
