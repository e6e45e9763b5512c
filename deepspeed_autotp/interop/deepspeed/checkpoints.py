# SPDX-License-Identifier: Apache-2.0
"""Hooks into the saving and loading of DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def watch_checkpoints(
    engine: Any, *, saving: Callable[[Path | None], None], loading: Callable[[Path], None]
) -> None:
    """Call ``saving`` and ``loading`` with the folder of a checkpoint before ``engine`` uses it.

    On every rank, so that they fail together. ``saving`` is given the folder on the rank that
    creates it, global rank 0 or, with node-local storage, local rank 0, and None on the others.
    Universal checkpoints, which have full weights, are loaded without a call.
    """
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def save_checkpoint(save_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
        if save_dir:
            name = f"global_step{engine.global_steps}" if tag is None else str(tag)
            saving(Path(save_dir, name) if rank == 0 else None)
        return save(save_dir, tag, *args, **kwargs)

    def load_checkpoint(load_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        latest = Path(load_dir, "latest")
        found = latest.read_text().strip() if tag is None and latest.is_file() else tag
        if not engine.load_universal_checkpoint():
            loading(Path(load_dir) if found is None else Path(load_dir, str(found)))
        return load(load_dir, tag, *args, **kwargs)

    engine.save_checkpoint = save_checkpoint
    engine.load_checkpoint = load_checkpoint
