# SPDX-License-Identifier: Apache-2.0
"""Calls of initialize with optimizers, schedulers, data, and models of the user."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from deepspeed_autotp.state.replica_check import CallCheck
from deepspeed_autotp.state.sharded_model import find_tensor_parallel
from tests.support.engine_config import Setting, config_without_section, engine_config
from tests.support.handmade_model import PARTITION, build_handmade, example, single_curve
from tests.support.loss_curves import (
    RATE,
    own_rows,
    sgd,
    single_losses,
    train_engine,
    worst_difference,
)
from tests.support.small_models import build, tokens

STEPS = 3
ADAM: dict[str, Any] = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}


def adam_losses(model: nn.Module) -> list[float]:
    """As DeepSpeed's Adam with these parameters, which decays weights apart from gradients."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1
    )
    losses = []
    for step in range(STEPS):
        ids = tokens(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def train_with_optimizer(kind: str, zero: int) -> float:
    """Worst loss difference with the optimizer given in one of the ways there are."""
    model, single = build("llama", tied=False), build("llama", tied=False)
    config = engine_config(Setting(tp=2, zero=zero, clip=0.0))
    more: dict[str, Any] = {}
    if kind == "built before":
        more["optimizer"] = sgd(model)
    elif kind == "with model_parameters":
        more |= {"optimizer": sgd(model), "model_parameters": list(model.parameters())}
    elif kind == "callable":
        more["optimizer"] = lambda parameters: torch.optim.SGD(parameters, lr=RATE)
        more["model_parameters"] = model.parameters()
    elif kind == "config SGD":
        config["optimizer"] = {"type": "SGD", "params": {"lr": RATE}}
        more["model_parameters"] = model.parameters()
    elif kind == "config Adam":
        config["optimizer"] = {"type": "AdamW", "params": {**ADAM, "torch_adam": True}}
        more["model_parameters"] = model.parameters()
    elif kind == "groups":
        halves = [list(model.model.parameters()), list(model.lm_head.parameters())]
        more["optimizer"] = torch.optim.SGD(
            [{"params": half, "weight_decay": 0.0} for half in halves], lr=RATE
        )
    adam = kind == "config Adam"
    expected = adam_losses(single) if adam else single_losses(single, clip=0.0, steps=STEPS)
    engine, optimizer, loader, scheduler = deepspeed_autotp.initialize(
        model=model, config=config, **more
    )
    assert optimizer is engine.optimizer and loader is None and scheduler is None
    return worst_difference(train_engine(engine, tp=2, steps=STEPS), expected)


def train_with_scheduler(kind: str) -> list[float]:
    """The learning rates of the steps with a scheduler that halves them."""
    model = build("llama", tied=False)
    optimizer = sgd(model)
    config = engine_config(Setting(tp=2, zero=1, clip=0.0))
    given: Any = None
    if kind == "callable":
        given = _halving
    elif kind == "object":
        given = _halving(optimizer)
    else:
        config["scheduler"] = {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": RATE, "warmup_num_steps": 2, "warmup_type": "linear"},
        }
    engine, _, _, scheduler = deepspeed_autotp.initialize(
        model=model, optimizer=optimizer, config=config, lr_scheduler=given
    )
    assert scheduler is not None and scheduler is engine.lr_scheduler
    rates = []
    for _ in range(STEPS):
        train_engine(engine, tp=2, steps=1)
        rates.append(engine.get_lr()[0])
    return rates


def _halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)


def _collate(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(rows) + 0


def rows_of_loader() -> list[list[int]]:
    """First tokens of the rows that the loader gives this rank."""
    model = build("llama", tied=False)
    data = [torch.full((4,), row) for row in range(8)]
    _, _, loader, _ = deepspeed_autotp.initialize(
        model=model,
        optimizer=sgd(model),
        config=engine_config(Setting(tp=2, zero=0, clip=0.0)),
        training_data=data,
        collate_fn=_collate,
    )
    assert loader is not None
    return [batch[:, 0].tolist() for batch in loader]


def straight_through(section: dict[str, Any] | None) -> tuple[bool, bool, float]:
    """Whether the model stayed as it was and DeepSpeed's own initialize was reached; losses."""
    expected = single_losses(build("llama", tied=False), clip=0.0, steps=STEPS)
    model = build("llama", tied=False)
    classes = [type(module) for module in model.modules()]
    config = config_without_section(tp=1)
    if section is not None:
        config["tensor_parallel"] = section
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=sgd(model), config=config)
    same = [type(module) for module in model.modules()] == classes
    own = engine.module is model and find_tensor_parallel(model) is None
    losses = train_engine(engine, tp=1, steps=STEPS)
    return same, own, worst_difference(losses, expected)


def train_handmade() -> float:
    """Worst loss difference of a model of one's own through initialize."""
    tp_size = dist.get_world_size()
    expected = single_curve(build_handmade(), rate=RATE)
    model = build_handmade()
    config = config_without_section(tp=tp_size)
    config["tensor_parallel"] = {"autotp_size": tp_size, "partition_config": PARTITION}
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=sgd(model), config=config)
    losses = []
    for step in range(len(expected)):
        loss = engine(**example(step))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return worst_difference(losses, expected)


def parallelize_first() -> float:
    """Worst loss difference of a model that parallelize has sharded, then given to DeepSpeed."""
    expected = single_losses(build("llama", tied=True), clip=1.0, steps=STEPS)
    model = build("llama", tied=True)
    deepspeed_autotp.parallelize(model, tp_size=2)
    config = engine_config(Setting(tp=2, zero=1, clip=1.0))
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=sgd(model), config=config)
    hooks = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, CallCheck)]
    assert len(hooks) == 1
    config["tensor_parallel"]["sequence_parallel"] = True
    try:
        deepspeed_autotp.initialize(model=model, optimizer=sgd(model), config=config)
    except ValueError as error:
        assert "the model was sharded without it" in str(error)
    else:
        raise AssertionError("sequence_parallel had no effect, in silence")
    return worst_difference(train_engine(engine, tp=2, steps=STEPS), expected)


def second_attempt() -> float:
    """Worst loss difference after DeepSpeed has refused the first optimizer."""
    expected = single_losses(build("llama", tied=False), clip=0.0, steps=STEPS)
    model = build("llama", tied=False)
    config = engine_config(Setting(tp=2, zero=0, clip=0.0))
    wrong = {**config, "optimizer": {"type": "Adamm", "params": {"lr": RATE}}}
    parameters = list(model.parameters())
    try:
        deepspeed_autotp.initialize(model=model, model_parameters=parameters, config=wrong)
    except Exception:
        pass
    else:
        raise AssertionError("DeepSpeed knows no Adamm")
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=sgd(model), config=config)
    return worst_difference(train_engine(engine, tp=2, steps=STEPS), expected)


def sharded_by(way: str) -> tuple[list[int], float]:
    """Ranks of this rank's group, and the loss difference, of parallelize in one of its ways."""
    from torch.distributed.device_mesh import init_device_mesh

    rank = dist.get_rank()
    more: dict[str, Any] = {}
    if way == "tp_size":
        more["tp_size"] = 2
    elif way == "group":
        more["tp_group"] = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    elif way == "mesh":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))
        more["mesh"] = mesh
    elif way == "config":
        more["config"] = {"autotp_size": 4}
    elif way == "nested":
        more["config"] = deepspeed_autotp.TPTrainingConfig(tp={"tp_size": 2})
    ids = own_rows(tokens(0), tp=dist.get_world_size())
    expected = float(build("llama", tied=False)(input_ids=ids, labels=ids).loss.detach())
    model = deepspeed_autotp.parallelize(build("llama", tied=False), **more)
    got = float(model(input_ids=ids, labels=ids).loss.detach())
    group = deepspeed_autotp.tensor_parallel(model).group
    return list(group.global_ranks), abs(got - expected) / expected
