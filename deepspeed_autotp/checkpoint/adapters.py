# SPDX-License-Identifier: Apache-2.0
"""The adapters of a sharded model into the files that PEFT writes."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from deepspeed_autotp.checkpoint.atomic_folder import AtomicFolder
from deepspeed_autotp.checkpoint.full_state import rank0_state_dict
from deepspeed_autotp.checkpoint.pretrained_folder import is_other_configuration, swap_folder
from deepspeed_autotp.checkpoint.ranks import Ranks
from deepspeed_autotp.interop.peft import saved_adapters, write_adapters

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
# PEFT adds to a model card that is there.
_CARD = "README.md"


def save_adapters(model: nn.Module, folder: Path, ranks: Ranks) -> None:
    """Write the adapters of ``model``. All ranks of the run call it, and fail together."""
    places = ranks.together(lambda: saved_adapters(model))
    names = set().union(*places.values())
    full = ranks.together(lambda: rank0_state_dict(model, frozen=True, names=names))

    def save() -> None:
        assert full is not None
        with ExitStack() as opened:
            staged = _open(folder, opened)
            if (staged.folder / _CARD).is_file():
                shutil.copyfile(staged.folder / _CARD, staged.staging / _CARD)
            write_adapters(model, staged.staging, full)
            named = [(_open(folder / place, opened), place) for place in places if place]
            for each, place in named:
                _move(staged.staging / place, each.staging)
            _commit(staged)
            for each, _ in named:
                _commit(each)

    ranks.on_first(save)


def _open(folder: Path, opened: ExitStack) -> AtomicFolder:
    staged = AtomicFolder(folder)
    opened.callback(staged.close)
    return staged


def _move(source: Path, target: Path) -> None:
    for entry in list(source.iterdir()):
        entry.rename(target / entry.name)
    source.rmdir()


def _commit(staged: AtomicFolder) -> None:
    """Let a loader find what is staged, weights last, where an adapter is among it."""
    if not (staged.staging / _WEIGHTS).exists():
        staged.commit(sorted(entry.name for entry in staged.staging.iterdir()))
        return
    if is_other_configuration(staged, _CONFIG, [_WEIGHTS]):
        swap_folder(staged)
        return
    written = {entry.name for entry in staged.staging.iterdir()}
    staged.commit([*sorted(written - {_WEIGHTS}), _WEIGHTS])
