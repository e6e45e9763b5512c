# SPDX-License-Identifier: Apache-2.0
"""Runs that save a checkpoint, and runs of another size that go on from it."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.support.engine_config import Setting, engine_config
from tests.support.loss_curves import own_rows, train_engine
from tests.support.small_models import build, tokens

ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.01}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 8}}


@dataclass(frozen=True, slots=True)
class Case:
    """A model and what is written into its DeepSpeed configuration."""

    family: str = "llama"
    tied: bool = True
    changes: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    groups: int = 2
    frozen: str = ""  # parameters with this in their names do not train
    momentum: bool = False  # the user's SGD instead of DeepSpeed's AdamW


@contextmanager
def float16_on_any_cpu() -> Iterator[None]:
    """DeepSpeed refuses float16 on a CPU that has no instructions for it, on which torch computes
    it all the same."""
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    with mock.patch.object(accelerator, "is_fp16_supported", lambda: True):
        yield


def make_engine(case: Case, setting: Setting, *, seed: int) -> Any:
    with float16_on_any_cpu():
        return _engine(case, setting, seed=seed)


def _engine(case: Case, setting: Setting, *, seed: int) -> Any:
    import deepspeed_autotp

    model = build(case.family, tied=case.tied, seed=seed, **case.changes)
    for name, parameter in model.named_parameters():
        if case.frozen and case.frozen in name:
            parameter.requires_grad = False
    config = engine_config(setting) | case.config
    if not case.momentum:
        config |= {"optimizer": ADAM, "scheduler": WARMUP}
        engine, *_ = deepspeed_autotp.initialize(
            model=model, model_parameters=_groups(model, case.groups), config=config
        )
        return engine
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    engine, *_ = deepspeed_autotp.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=config
    )
    return engine


def _groups(model: torch.nn.Module, count: int) -> Any:
    """The parameters that train; in two groups as the Trainer makes them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if count == 1:
        return trained
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def save_and_go_on(case: Case, setting: Setting, folder: str, steps: int) -> list[float]:
    """The losses after a checkpoint that is saved after ``steps`` steps."""
    engine = make_engine(case, setting, seed=0)
    train_engine(engine, tp=setting.tp, steps=steps)
    engine.save_checkpoint(folder, client_state={"note": torch.arange(3)})
    losses = train_engine(engine, tp=setting.tp, first=steps, steps=steps)
    engine.destroy()
    return losses


def load_and_go_on(case: Case, setting: Setting, folder: str, steps: int) -> list[float]:
    """The losses of a run with other weights that loads the checkpoint."""
    import deepspeed_autotp

    engine = make_engine(case, setting, seed=1)
    path, client = engine.load_checkpoint(folder)
    assert path is not None and path.startswith(folder)
    assert client["note"].tolist() == [0, 1, 2]
    assert engine.global_steps == steps
    assert engine.skipped_steps == 0
    losses = train_engine(engine, tp=setting.tp, first=steps, steps=steps)
    if not case.momentum:
        assert engine.lr_scheduler.last_batch_iteration == 2 * steps - 1
    if setting.tp > 1:
        deepspeed_autotp.check_replicas(engine)
    engine.destroy()
    return losses


def refused_load(
    case: Case, setting: Setting, folder: str, asked: dict[str, Any], fused: bool = False
) -> str:
    """What loading raises; the weights are as they were. ``fused``: into an optimizer as DeepSpeed
    has it around a fused one, in which the states are those of all parameters together.

    With ``{rank}`` in ``folder`` each rank has another.
    """
    import deepspeed_autotp

    engine = make_engine(case, setting, seed=1)
    if fused:
        cls = type(engine.optimizer)
        engine.optimizer.__class__ = type("FP16_Optimizer", (cls,), {})
    folder = folder.format(rank=dist.get_rank())
    before = deepspeed_autotp.full_state_dict(engine)
    with pytest.raises(ValueError) as caught:
        engine.load_checkpoint(folder, **asked)
    after = deepspeed_autotp.full_state_dict(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    engine.destroy()
    return str(caught.value)


def scales(case: Case, setting: Setting, folder: str, load: bool) -> list[Any]:
    """The dynamic loss scale and skipped steps at a checkpoint, which is saved or loaded, and in
    the four steps after it, of which the third has infinite gradients."""
    engine = make_engine(case, setting, seed=int(load))
    found = []
    if load:
        engine.load_checkpoint(folder)
        found.append(_scale(engine))
    else:
        found += [_scale_after(engine, setting, step) for step in range(3)][-1:]
        engine.save_checkpoint(folder)
    found += [_scale_after(engine, setting, step) for step in range(3, 7)]
    engine.destroy()
    return found


def _scale_after(engine: Any, setting: Setting, step: int) -> dict[str, Any]:
    ids = own_rows(tokens(step), tp=setting.tp)
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss * (float("inf") if step in (0, 5) else 1))
    engine.step()
    return _scale(engine)


def _scale(engine: Any) -> dict[str, Any]:
    scaler = vars(engine.optimizer.loss_scaler)
    return {**scaler, "skipped": engine.skipped_steps, "steps": engine.global_steps}


def convert_to_universal(folder: str) -> None:
    """What ``python -m deepspeed.checkpoint.ds_to_universal`` does, in this process."""
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    tag = Path(folder, "latest").read_text()
    ds_to_universal.main(
        Namespace(
            input_folder=str(Path(folder, tag)),
            output_folder=str(Path(folder, f"{tag}_universal")),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
    )


def load_universal_and_go_on(case: Case, setting: Setting, folder: str, steps: int) -> list[float]:
    """The losses of a run that loads a universal checkpoint."""
    engine = make_engine(case, setting, seed=1)
    engine.load_checkpoint(folder)
    losses = train_engine(engine, tp=setting.tp, first=steps, steps=steps)
    engine.destroy()
    return losses


def wrong_affine_maps(ranks: int) -> list[str]:
    """Parameters whose shards DeepSpeed takes or joins otherwise than the plan does."""
    from deepspeed.checkpoint.affine import ParamAffineMap

    from deepspeed_autotp._core import Plan
    from deepspeed_autotp.checkpoint.layout import Layout
    from deepspeed_autotp.checkpoint.universal import parameter_meta
    from deepspeed_autotp.state.sharded_model import shard_of
    from tests.support.core_llama import llama, preset

    plan = Plan(llama(), preset(), ranks=ranks)
    parameters = Layout.of_plan(plan).parameters
    wrong = []
    for entry in plan.entries:
        meta = parameter_meta(parameters[entry.name], ranks)
        affine = ParamAffineMap.from_dict(meta["conversion"]["affine_map"])
        full = torch.arange(torch.Size(entry.shape).numel()).reshape(entry.shape)
        shards = {rank: affine.extract(full, rank) for rank in range(ranks)}
        own = {
            rank: shard_of(full, entry=entry, rank=rank) if entry.is_sharded else full
            for rank in range(ranks)
        }
        if not all(torch.equal(shards[rank], own[rank]) for rank in own) or not torch.equal(
            affine.rebuild(shards).reshape(entry.shape), full
        ):
            wrong.append(entry.name)
    return wrong
