# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for the commands of ``autotp``, and what transformers loads of them."""

from typing import Any

import torch

from tests.support.engine_config import Setting
from tests.support.loss_curves import train_engine
from tests.support.resumed_runs import Case, make_engine

State = dict[str, torch.Tensor]


def save(case: Case, setting: Setting, folder: str) -> State:
    """The full weights of a run that saves a checkpoint after two steps."""
    import deepspeed_autotp

    engine = make_engine(case, setting, seed=0)
    train_engine(engine, tp=setting.tp, steps=2)
    engine.save_checkpoint(folder)
    full = deepspeed_autotp.full_state_dict(engine)
    engine.destroy()
    return full


def from_pretrained(folder: str) -> State:
    """The weights that transformers loads."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    state: State = model.state_dict()
    return state
