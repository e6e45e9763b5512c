# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for the commands of ``autotp``, and the commands in a process of their own."""

import contextlib
import io
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


def command(*arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of ``autotp``."""
    from deepspeed_autotp.cli.main import main

    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main(arguments)
    return status, out.getvalue(), errors.getvalue()


def from_pretrained(folder: str) -> State:
    """The weights that transformers loads."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    state: State = model.state_dict()
    return state
