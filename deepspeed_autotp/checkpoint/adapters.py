# SPDX-License-Identifier: Apache-2.0
"""The adapters of a sharded model into the files that PEFT writes."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from deepspeed_autotp.checkpoint.atomic_folder import AtomicFolder
from deepspeed_autotp.checkpoint.full_state import rank0_state_dict
from deepspeed_autotp.checkpoint.pretrained_folder import is_other_configuration, swap_folder
from deepspeed_autotp.checkpoint.ranks import Ranks
from deepspeed_autotp.interop.peft import adapter_names, write_adapters

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
# PEFT adds to a model card that is there.
_CARD = "README.md"


def save_adapters(model: nn.Module, folder: Path, ranks: Ranks) -> None:
    """Write the adapter of ``model``. All ranks of the run call it, and fail together."""
    names = ranks.together(lambda: adapter_names(model))
    full = ranks.together(lambda: rank0_state_dict(model, frozen=True, names=names))

    def save() -> None:
        assert full is not None
        staged = AtomicFolder(folder)
        try:
            if (staged.folder / _CARD).is_file():
                shutil.copyfile(staged.folder / _CARD, staged.staging / _CARD)
            write_adapters(model, staged.staging, full)
            _commit(staged)
        finally:
            staged.close()

    ranks.on_first(save)


def _commit(staged: AtomicFolder) -> None:
    if is_other_configuration(staged, _CONFIG, [_WEIGHTS]):
        swap_folder(staged)
        return
    written = {entry.name for entry in staged.staging.iterdir()}
    staged.commit([*sorted(written - {_WEIGHTS}), _WEIGHTS])
