# SPDX-License-Identifier: Apache-2.0
"""All stages of a run, in a plain loop and with DeepSpeed's engine."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import deepspeed_autotp
from tests.support.engine_config import Setting, engine_config
from tests.support.faults.cell import FAULTY_STEP, RANKS, STEPS
from tests.support.faults.rank import Rank
from tests.support.pretrained_models import build_pretrained
from tests.support.small_models import tokens

RATE = 0.1
# A replicated and a sharded weight.
NORM, WEIGHT = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


def loop(rank: Rank) -> None:
    model: Any = build_pretrained("llama")
    _damage(rank, "plan", model)
    _damage(rank, "self-check", model)
    # That of the model itself sees its weights; later stages do without.
    checks = {"plan": "auto", "shard": "auto", "self-check": True, "": "auto"}
    config = {"self_check": checks.get(rank.cell.stage, False)}

    def shard() -> nn.Module:
        return deepspeed_autotp.parallelize(model, tp_size=RANKS, config=config)

    if rank.cell.stage == "shard":  # within the same call
        rank.stage = "shard"
        shard()
    else:
        rank.called("plan", shard)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        _step(rank, model, optimizer, step)
    if rank.cell.stage in ("save", "load", ""):
        _save_and_load(rank, model)
        _step(rank, model, optimizer, STEPS)
    rank.called("close", lambda: deepspeed_autotp.destroy(model))


def _save_and_load(rank: Rank, model: nn.Module) -> None:
    saved = rank.folder / "saved"
    _damage(rank, "save", model)
    rank.called("save", lambda: deepspeed_autotp.save_pretrained(model, saved))
    if rank.has("load", "shape"):
        build_pretrained("llama", intermediate_size=128).save_pretrained(rank.folder / "other")
        rank.begin()
        saved = rank.folder / "other"
    load = deepspeed_autotp.from_pretrained
    rank.called("load", lambda: load(AutoModelForCausalLM, saved, tp_size=RANKS))


def _step(rank: Rank, model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    at_fault = step == FAULTY_STEP
    ids = tokens(step)
    if at_fault and rank.has("forward", "shape"):
        rank.begin()
        ids = tokens(step, length=10)
    loss = rank.called("forward", lambda: model(input_ids=ids, labels=ids).loss, at_fault=at_fault)
    if loss is None:  # as in a loop that leaves out a batch
        return
    rank.note("loss", step, float(loss.detach()))
    again = rank.has("backward", "repeats")
    rank.called("backward", lambda: loss.backward(retain_graph=again), at_fault=at_fault)
    if at_fault and rank.has("step", "nan"):
        rank.begin()
        model.get_parameter(WEIGHT).grad.fill_(torch.nan)
    clip = deepspeed_autotp.clip_grad_norm_
    norm = rank.called("step", lambda: clip(model, 1.0), at_fault=at_fault)
    if norm is not None:
        rank.note("norm", step, float(norm))
    optimizer.step()
    optimizer.zero_grad()


def engine(rank: Rank) -> None:
    model = build_pretrained("llama")
    config = engine_config(Setting(tp=RANKS, zero=1, clip=1.0))
    if rank.has("merge", "shape"):
        rank.begin()
        config["train_micro_batch_size_per_gpu"] = 2
        del config["train_batch_size"]
    if rank.has("merge", "nan"):
        rank.begin()
        config["gradient_clipping"] = float("nan")

    def start() -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        return deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)[0]

    made = rank.called("merge", start)
    if made is None:  # and goes on with the model as it is
        model(input_ids=tokens(0), labels=tokens(0))
        return
    for step in range(STEPS):
        _engine_step(rank, made, step)
    saved = rank.folder / "saved"
    _damage(rank, "save", model)
    rank.called("save", lambda: made.save_checkpoint(str(saved)))
    if rank.has("load", "shape"):
        rank.begin()
        saved = rank.folder / "other"
    rank.called("load", lambda: made.load_checkpoint(str(saved)))
    _engine_step(rank, made, STEPS)
    rank.called("close", made.destroy)


def _engine_step(rank: Rank, engine: Any, step: int) -> None:
    at_fault, ids = step == FAULTY_STEP, tokens(step)
    loss = engine(input_ids=ids, labels=ids).loss
    rank.note("loss", step, float(loss.detach()))
    engine.backward(loss)
    if at_fault and rank.has("step", "nan"):
        rank.begin()
        engine.optimizer.averaged_gradients[0][0].fill_(torch.nan)

    def stepped() -> float:
        engine.step()
        return float(engine.get_global_grad_norm())

    norm = rank.called("step", stepped, at_fault=at_fault)
    if norm is not None:
        rank.note("norm", step, norm)


def _damage(rank: Rank, stage: str, model: nn.Module) -> None:
    """Give this rank alone values that are not finite, or a weight of another shape."""
    if not rank.has(stage, "nan", "shape"):
        return
    rank.begin()
    weight = model.get_parameter(WEIGHT)
    if rank.cell.fault == "nan":
        nn.init.constant_(weight, torch.nan)
    else:
        weight.data = weight.data[:-1].clone()
