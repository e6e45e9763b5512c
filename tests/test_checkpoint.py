# SPDX-License-Identifier: Apache-2.0
"""A run that is saved and loaded at the same degree goes on as if it had not stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import build
from tests.pool import Pool
from tests.training import Setting, engine_config, train_engine

STEPS = 2
ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.01}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 6}}


def make_engine(setting: Setting, *, tied: bool, seed: int, configured: bool) -> Any:
    """An engine whose optimizer is the user's, or made by DeepSpeed with a schedule."""
    import deepspeed_autotp

    model = build("llama", tied=tied, seed=seed)
    config = engine_config(setting)
    if configured:
        config |= {"optimizer": ADAM, "scheduler": WARMUP}
        engine, *_ = deepspeed_autotp.initialize(
            model=model, model_parameters=model.parameters(), config=config
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def stop_and_go_on(
    setting: Setting, tied: bool, configured: bool, folder: str
) -> tuple[list[float], list[float], bool]:
    """Losses after the checkpoint, of the run that went on and of the one that was loaded into
    other weights; and whether both end with the same weights."""
    import deepspeed_autotp

    engine = make_engine(setting, tied=tied, seed=0, configured=configured)
    train_engine(engine, tp=setting.tp, steps=STEPS)
    assert engine.save_checkpoint(folder, client_state={"note": "kept"})
    went_on = train_engine(engine, tp=setting.tp, first=STEPS, steps=STEPS)
    ended = deepspeed_autotp.full_state_dict(engine)
    engine.destroy()

    engine = make_engine(setting, tied=tied, seed=1, configured=configured)
    path, client = engine.load_checkpoint(folder)
    assert path is not None
    assert client["note"] == "kept"
    assert engine.global_steps == STEPS
    loaded = train_engine(engine, tp=setting.tp, first=STEPS, steps=STEPS)
    deepspeed_autotp.check_replicas(engine)
    after = deepspeed_autotp.full_state_dict(engine)
    engine.destroy()
    return went_on, loaded, all(torch.equal(ended[name], after[name]) for name in ended)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("tied", "configured"),
    [(False, False), (True, True)],
    ids=["untied, own optimizer", "tied, configured optimizer and schedule"],
)
def test_loaded_run_goes_on_as_the_saved_one(
    pool: Pool, zero: int, tied: bool, configured: bool, tmp_path: Path
) -> None:
    setting = Setting(tp=2, zero=zero, clip=1.0)
    args = (setting, tied, configured, str(tmp_path))
    for went_on, loaded, same in pool.run(stop_and_go_on, *args, ranks=4):
        assert loaded == went_on
        assert same


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_loaded_sixteen_bit_run_goes_on_as_the_saved_one(
    pool: Pool, zero: int, tmp_path: Path
) -> None:
    setting = Setting(tp=2, zero=zero, clip=1.0, precision="bf16")
    for went_on, loaded, same in pool.run(
        stop_and_go_on, setting, False, False, str(tmp_path), ranks=4
    ):
        assert loaded == went_on
        assert same
