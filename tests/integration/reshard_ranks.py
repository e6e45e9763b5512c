# SPDX-License-Identifier: Apache-2.0
"""Runs that save a checkpoint, or load one and save it at once."""

from typing import Any

import torch

from tests.support.engine_config import Setting
from tests.support.loss_curves import train_engine
from tests.support.resumed_runs import Case, make_engine
from tests.support.small_models import build


def save(case: Case, setting: Setting, folder: str) -> None:
    """Save a checkpoint after two steps."""
    engine = make_engine(case, setting, seed=0)
    train_engine(engine, tp=setting.tp, steps=2)
    engine.save_checkpoint(folder, client_state={"note": torch.arange(3)})
    engine.destroy()


def load_and_save(case: Case, setting: Setting, folder: str, out: str) -> bool:
    """Save again what was loaded; whether DeepSpeed read the files itself."""
    from deepspeed_autotp.interop.deepspeed import checkpoints

    engine = make_engine(case, setting, seed=1)
    made: list[object] = []
    own = checkpoints._load_from_memory
    checkpoints._load_from_memory = lambda *args: made.append(args) or own(*args)
    try:
        _, client = engine.load_checkpoint(folder)
    finally:
        checkpoints._load_from_memory = own
    engine.save_checkpoint(out, client_state={"note": client["note"]})
    engine.destroy()
    return not made


def write_config(case: Case, folder: str) -> None:
    """Write the configuration of a model."""
    model: Any = build(case.family, tied=case.tied, **case.changes)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
