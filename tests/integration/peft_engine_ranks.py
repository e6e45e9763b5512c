# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_peft_engine.py do: engines that train adapters."""

from typing import Any

import deepspeed_autotp
from tests.support.engine_config import Setting, engine_config
from tests.support.loss_curves import train_engine
from tests.support.peft_models import lora
from tests.support.raised_error import raised_error
from tests.support.resumed_runs import ADAM
from tests.support.small_models import build


def make_engine(setting: Setting, *, is_late: bool = False, seed: int = 3) -> Any:
    """An engine that trains LoRA on a llama in float32."""
    model = build("llama", tied=False)
    if is_late:
        deepspeed_autotp.parallelize(model, tp_size=setting.tp)
    adapted = lora(model, seed, target_modules="all-linear")
    trained = [p for p in adapted.parameters() if p.requires_grad]
    config = engine_config(setting) | {"optimizer": ADAM}
    engine, *_ = deepspeed_autotp.initialize(model=adapted, model_parameters=trained, config=config)
    return engine


def engine_curve(setting: Setting, is_late: bool) -> tuple[list[float], dict[str, str]]:
    """Losses of an engine, and what of its adapters cannot be changed."""
    from peft import LoraConfig

    engine = make_engine(setting, is_late=is_late)
    losses = train_engine(engine, tp=setting.tp)
    said = {}
    if setting.tp > 1:
        more = LoraConfig(r=2, target_modules=["q_proj"])
        said["added"] = raised_error(lambda: engine.module.add_adapter("more", more))
        if setting.zero == 3:
            said["merged in place"] = raised_error(engine.module.merge_adapter)
        said["merged"] = raised_error(lambda: engine.module.merge_and_unload())
        said["deleted"] = raised_error(lambda: engine.module.delete_adapter("default"))
    model = engine.module
    engine.destroy()
    if is_late and setting.zero == 0:
        deepspeed_autotp.checkpoint_state(model)
        model.add_adapter("more", LoraConfig(r=2, target_modules=["q_proj"]))
    return losses, said


def save_engine(setting: Setting, is_late: bool, folder: str) -> list[float]:
    """The losses after a checkpoint."""
    engine = make_engine(setting, is_late=is_late)
    train_engine(engine, tp=setting.tp, steps=2)
    engine.save_checkpoint(folder)
    losses = train_engine(engine, tp=setting.tp, first=2, steps=2)
    engine.destroy()
    return losses


def load_engine(setting: Setting, folder: str) -> list[float]:
    """The losses of other adapters that load the checkpoint."""
    engine = make_engine(setting, seed=5)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    losses = train_engine(engine, tp=setting.tp, first=2, steps=2)
    engine.destroy()
    return losses
