# SPDX-License-Identifier: Apache-2.0
"""What ``save_16bit_model`` and ``Trainer.save_model`` write: full weights, not shards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor


def save_full_weights(
    engine: Any,
    *,
    full_state: Callable[[bool], dict[str, Tensor] | None],
    replaced: Callable[[Path], AbstractContextManager[Path]],
) -> None:
    """Let ``engine`` write full weights wherever it writes a model without its optimizer.

    ``full_state(frozen)`` is the state dict on rank 0 and None elsewhere. Without it DeepSpeed
    0.19.8 writes the shards of rank 0 in ``save_16bit_model`` unless ZeRO 3 is on, and omits the
    buffers in what ``Trainer.save_model`` takes. ``replaced(file)`` gives a name to write in place
    of that of ``file``, so that a crash leaves the file that was there.
    """
    save = engine.save_16bit_model

    def save_16bit_model(
        save_dir: str,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        engine.module_state_dict = lambda **_: full_state(not exclude_frozen_parameters)
        try:
            # Others than this write after they have returned.
            if type(engine.checkpoint_engine).__name__ != "TorchCheckpointEngine":
                return bool(save(save_dir, save_filename, exclude_frozen_parameters))
            with replaced(Path(save_dir, save_filename)) as written:
                name = str(written.relative_to(save_dir))
                return bool(save(save_dir, name, exclude_frozen_parameters))
        finally:
            del engine.module_state_dict

    engine.save_16bit_model = save_16bit_model
    engine._replace_module_consolidated_state_dict = lambda: full_state(True)
