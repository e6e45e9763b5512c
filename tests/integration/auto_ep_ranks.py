# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_auto_ep.py do: DeepSpeed's AutoEP around a sharded model."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.architectures import build
from tests.support.engine_config import Setting, engine_config
from tests.support.fused_sgd import fused_sgd
from tests.support.loss_curves import RATE, own_rows
from tests.support.raised_error import raised_error
from tests.support.small_models import tokens

STEPS = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One engine, without AutoEP where ``ep`` is 0. ``auxiliary`` is the weight of the
    load-balancing loss."""

    name: str
    zero: int
    tp: int = 2
    ep: int = 2
    clip: float = 0.0
    auxiliary: float = 0.0
    accumulate: int = 1
    precision: str = "fp32"
    is_fused: bool = False  # the optimizer is one that DeepSpeed wraps as its FusedAdam
    section: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.0  # of the router's inputs in training
    given: str = "list"  # of parameters
    compiles: bool = False
    frozen: str = ""  # what the names of frozen parameters have in them


def model_of(case: Case) -> nn.Module:
    model = build(case.name)
    if case.precision == "bf16":  # weights that it represents
        model = model.to(torch.bfloat16).float()
    if case.auxiliary:
        model.config.output_router_logits = True
        model.config.router_aux_loss_coef = model.router_aux_loss_coef = case.auxiliary
    if case.noise:
        model.config.router_jitter_noise = case.noise
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not case.frozen or case.frozen not in name)
    return model


def config_of(case: Case) -> dict[str, Any]:
    setting = Setting(
        tp=case.tp,
        zero=case.zero,
        clip=case.clip,
        accumulate=case.accumulate,
        precision=case.precision,
    )
    config = engine_config(setting)
    if case.ep:
        config["expert_parallel"] = {"enabled": True, "autoep_size": case.ep, **case.section}
    if not case.is_fused:
        config["optimizer"] = {"type": "SGD", "params": {"lr": RATE}}
    return config


def engine_of(case: Case, model: nn.Module | None = None) -> Any:
    model = model_of(case) if model is None else model
    parameters = list(model.parameters())
    optimizer = fused_sgd(parameters) if case.is_fused else None
    given: Any = {"list": list, "tuple": tuple, "iterator": iter}.get(case.given, tuple)(parameters)
    if case.given == "groups":
        given = [{"params": given[:2]}, {"params": given[2:]}]
    return deepspeed_autotp.initialize(
        model=model, optimizer=optimizer, model_parameters=given, config=config_of(case)
    )[0]


def one_process(case: Case) -> tuple[nn.Module, list[float], list[float]]:
    """The trained model, its losses and gradient norms; a step is of the rows of each replica in
    turn, since a load-balancing loss is not linear in them."""
    model = model_of(case)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses, norms = [], []
    parts = dist.get_world_size() // case.tp * case.accumulate
    for step in range(STEPS):
        total = 0.0
        for rows in tokens(step).chunk(parts):
            loss = model(input_ids=rows, labels=rows).loss / parts
            loss.backward()
            total += float(loss.detach())
        most = case.clip or float("inf")
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), most)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return model, losses, norms


def train_steps(case: Case, engine: Any, first: int = 0, steps: int = STEPS) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        total = torch.zeros(())
        for rows in own_rows(tokens(step), tp=case.tp).chunk(case.accumulate):
            loss = engine(input_ids=rows, labels=rows).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / case.accumulate
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return losses


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert set(found) == set(expected), set(found) ^ set(expected)
    return max(float((found[n].float() - t).abs().max()) for n, t in expected.items())


def train(case: Case) -> dict[str, Any]:
    alone, losses, norms = one_process(case)
    engine = engine_of(case)
    if case.compiles:
        engine.module.compile(backend="aot_eager")
    start = worst(deepspeed_autotp.full_state_dict(engine), model_of(case).state_dict())
    found, own_norms = [], []
    for step in range(STEPS):
        found += train_steps(case, engine, step, 1)
        own_norms.append(engine.get_global_grad_norm())
    deepspeed_autotp.check_replicas(engine)
    result = {
        "start": start,
        "losses": max(abs(a - b) / abs(b) for a, b in zip(found, losses, strict=True)),
        "norms": [None if n is None else float(n) for n in own_norms],
        "expected": norms,
        "wrapper": type(engine.optimizer).__name__,
        "weights": worst(deepspeed_autotp.full_state_dict(engine), alone.state_dict()),
        "parameters": engine.module.num_parameters() - alone.num_parameters(),
    }
    engine.destroy()
    return result


def resume(case: Case, folder: str) -> dict[str, Any]:
    """Two steps, a checkpoint, and two more steps, of the engine that wrote it and of another."""
    engine = engine_of(case)
    train_steps(case, engine, 0, 2)
    engine.save_checkpoint(folder)
    expected = train_steps(case, engine, 2, 2)
    weights = deepspeed_autotp.full_state_dict(engine)
    engine.destroy()
    model = model_of(case)
    with torch.no_grad():  # as if it were drawn anew
        for parameter in model.parameters():
            parameter.mul_(0.5)
    other = engine_of(case, model)
    path, _ = other.load_checkpoint(folder)
    found = train_steps(case, other, 2, 2)
    full = deepspeed_autotp.full_state_dict(other)
    other.destroy()
    return {
        "loaded": path is not None,
        "losses": (found, expected),
        "weights": worst(full, weights),
    }


def load_error(case: Case, folder: str) -> str:
    """What the loading of a checkpoint raises."""
    engine = engine_of(case)
    try:
        return raised_error(lambda: engine.load_checkpoint(folder))
    finally:
        engine.destroy()


def saved_for_inference(case: Case, folder: str) -> dict[str, Any]:
    """save_16bit_model against the weights, loaded by transformers' names; and what is refused."""
    engine = engine_of(case)
    train_steps(case, engine, 0, 1)
    engine.save_16bit_model(folder)
    dist.barrier()
    saved = torch.load(Path(folder, "pytorch_model.bin"))
    full = deepspeed_autotp.full_state_dict(engine)
    model = model_of(case)
    model.load_state_dict(saved)
    expert = next(p for n, p in engine.module.named_parameters() if n.endswith("experts.w1"))

    def gather(given: Any) -> None:
        with deepspeed_autotp.gather_params(given):
            pass

    result = {
        "difference": worst(saved, full),
        "refused": [
            raised_error(lambda: deepspeed_autotp.save_pretrained(engine, folder)),
            raised_error(lambda: list(deepspeed_autotp.iter_full_parameters(engine))),
            raised_error(lambda: gather(engine)),
            raised_error(lambda: gather(expert)),
        ],
    }
    engine.destroy()
    return result


def refused(case: Case, more: dict[str, Any]) -> tuple[str, bool]:
    """What ``initialize`` raises with more keys, and whether the model is as it was."""
    model = model_of(case)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    config = config_of(case)
    for key, value in more.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    text = raised_error(
        lambda: deepspeed_autotp.initialize(
            model=model, model_parameters=list(model.parameters()), config=config
        )
    )
    return text, all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def refused_on_one_rank(case: Case, section: dict[str, Any]) -> str:
    """What ``initialize`` raises where rank 1 has other keys in its section."""
    if dist.get_rank() == 1:
        case = replace(case, section=section)
    return raised_error(lambda: engine_of(case))


def refused_of_other_weights(case: Case) -> str:
    """What ``initialize`` raises where each TP group has weights of its own."""
    model = model_of(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + dist.get_rank() // case.tp)
    return raised_error(lambda: engine_of(case, model))


def refused_later(case: Case) -> list[str]:
    """What a second engine around the same model raises, and one around a sharded model."""
    model = model_of(case)
    engine_of(case, model).destroy()
    plain = config_of(case)
    del plain["expert_parallel"]
    found = [raised_error(lambda: engine_of(case, model))]
    found.append(raised_error(lambda: deepspeed_autotp.initialize(model=model, config=plain)))
    sharded = model_of(case)
    deepspeed_autotp.parallelize(sharded, tp_size=case.tp)
    found.append(raised_error(lambda: engine_of(case, sharded)))
    built = model_of(case)
    config = config_of(case)
    del config["optimizer"]
    optimizer = torch.optim.SGD(built.parameters(), lr=RATE)
    found.append(
        raised_error(
            lambda: deepspeed_autotp.initialize(model=built, optimizer=optimizer, config=config)
        )
    )
    return found


def registry_is_left() -> bool:
    """Whether transformers' registry of recorded outputs is as before once an engine is there."""
    from transformers.utils import output_capturing

    registry = output_capturing._CAN_RECORD_REGISTRY
    model_of(Case("mixtral", zero=1))
    before, functions = dict(registry), dict(vars(type(registry)))
    engine_of(Case("mixtral", zero=1)).destroy()
    return dict(registry) == before and dict(vars(type(registry))) == functions
