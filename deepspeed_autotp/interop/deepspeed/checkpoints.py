# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed's engine is made to do on saving and loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor


def save_whole_weights(engine: Any, *, whole: Callable[[bool], dict[str, Tensor] | None]) -> None:
    """Let ``engine`` write whole weights wherever it writes a model without its optimizer.

    ``whole(frozen)`` is the state on the first rank and None elsewhere. Without it DeepSpeed
    0.19.8 writes the first rank's shards in ``save_16bit_model`` unless ZeRO 3 is on, and
    leaves the buffers away in what ``Trainer.save_model`` takes.
    """
    save = engine.save_16bit_model

    def save_16bit_model(
        save_dir: str,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        engine.module_state_dict = lambda **_: whole(not exclude_frozen_parameters)
        try:
            saved: bool = save(save_dir, save_filename, exclude_frozen_parameters)
        finally:
            del engine.module_state_dict
        return saved

    engine.save_16bit_model = save_16bit_model
    engine._replace_module_consolidated_state_dict = lambda: whole(True)


def watch_checkpoints(
    engine: Any, *, saving: Callable[[Path | None], None], loading: Callable[[Path], None]
) -> None:
    """Call ``saving`` and ``loading`` with the folder of a checkpoint before ``engine`` uses it.

    On every rank, so that they fail together. ``saving`` is given the folder where this rank makes
    it, on the first of the world or, where checkpoints lie on the machines' own disks, of each
    machine, and else None. Universal checkpoints, which are whole, are loaded without a call.
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
