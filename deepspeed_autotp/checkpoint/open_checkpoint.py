# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of sharded runs, found and opened by one process without ranks."""

from __future__ import annotations

from pathlib import Path

from deepspeed_autotp.checkpoint.metadata import Metadata, read_metadata
from deepspeed_autotp.checkpoint.rank_files import CheckpointFiles
from deepspeed_autotp.checkpoint.saved_checkpoint import SavedCheckpoint
from deepspeed_autotp.checkpoint.unsharded import is_unsharded, layout_of_files, ties_of_files


def checkpoint_folder(path: Path) -> Path:
    """The folder of a checkpoint: ``path``, or what the file ``latest`` in it names.

    ValueError where there is none.
    """
    path = path.resolve()
    latest = path / "latest"
    folder = path / latest.read_text(encoding="utf-8").strip() if latest.is_file() else path
    if any(folder.glob("*_model_states.pt")):
        return folder
    raise ValueError(
        f"{str(path)!r}: found no file *_model_states.pt, expected a checkpoint of DeepSpeed, or a "
        "folder of them with the file 'latest'; name one of them"
    )


def open_checkpoint(folder: Path) -> tuple[SavedCheckpoint, Metadata | None]:
    """A checkpoint that a sharded run has saved, or, without metadata, one of TP size 1.

    ValueError where it is neither, or not whole.
    """
    files, metadata = CheckpointFiles(folder), read_metadata(folder)
    if metadata is not None and metadata.layout is not None:
        return SavedCheckpoint(files, metadata.layout, groups=metadata.groups), metadata
    if metadata is None and is_unsharded(folder):
        layout = layout_of_files(folder, ties_of_files(folder))
        return SavedCheckpoint(files, layout, groups=None), None
    version = "none" if metadata is None else f"version {metadata.version}"
    raise ValueError(
        f"{str(folder)!r}: tensor_parallel.json: got {version}, expected version 3 or later "
        "with the layout of the shards; load the checkpoint at the TP size it was saved at, "
        "and save it again"
    )
