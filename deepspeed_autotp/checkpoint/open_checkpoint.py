# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of sharded runs, found and opened by one process without ranks."""

from __future__ import annotations

from pathlib import Path

from deepspeed_autotp.checkpoint.metadata import Metadata, read_metadata
from deepspeed_autotp.checkpoint.saved_checkpoint import CheckpointFiles, SavedCheckpoint


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


def open_checkpoint(folder: Path) -> tuple[SavedCheckpoint, Metadata]:
    """A checkpoint that a sharded run has saved. ValueError where it is none, or not whole."""
    metadata = read_metadata(folder)
    if metadata is None or metadata.layout is None:
        version = "none" if metadata is None else f"version {metadata.version}"
        raise ValueError(
            f"{str(folder)!r}: tensor_parallel.json: got {version}, expected version 3 or later "
            "with the layout of the shards; load the checkpoint at the TP size it was saved at, "
            "and save it again"
        )
    files = CheckpointFiles(folder)
    return SavedCheckpoint(files, metadata.layout, groups=metadata.groups), metadata
