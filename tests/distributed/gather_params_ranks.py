# SPDX-License-Identifier: Apache-2.0
"""Run on every rank by tests.distributed.test_gather_params."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.engine_config import Setting, engine_config
from tests.support.loss_curves import train_engine
from tests.support.raised_error import raised_error
from tests.support.small_models import build, tokens

# A column and a row layer, tied embeddings whose vocabulary is sharded, and a replicated norm.
COLUMN = "model.layers.0.self_attn.q_proj.weight"
ROW = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
NAMES = (COLUMN, ROW, EMBEDDING, NORM)


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [model.get_parameter(name) for name in NAMES]


def sharded() -> nn.Module:
    model = build("llama", tied=True)
    return deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())


def local(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """The memory of every parameter, and what is in it."""
    return {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}


def same(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> bool:
    return all(
        p.data_ptr() == before[n][0] and torch.equal(p, before[n][1])
        for n, p in model.named_parameters()
    )


def reads() -> dict[str, bool]:
    """What is read within, and that nothing is left of changes without a modifier."""
    full = dict(build("llama", tied=True).named_parameters())
    model = sharded()
    before = local(model)
    found = {}
    with deepspeed_autotp.gather_params(model.get_parameter(COLUMN)):
        found["one"] = torch.equal(model.get_parameter(COLUMN), full[COLUMN])
        found["not others"] = model.get_parameter(ROW).shape != full[ROW].shape
    with deepspeed_autotp.gather_params(parameters(model)):
        found["several"] = all(torch.equal(model.get_parameter(n), full[n]) for n in NAMES)
    with deepspeed_autotp.gather_params(model.get_submodule("model.layers.1")):
        found["a module"] = torch.equal(model.get_parameter(ROW), full[ROW])
    with deepspeed_autotp.gather_params(model), torch.no_grad():
        found["all"] = all(torch.equal(p, full[n]) for n, p in model.named_parameters())
        for parameter in model.parameters():
            parameter.zero_()
    found["discarded"] = same(model, before)
    with deepspeed_autotp.gather_params(model):
        with deepspeed_autotp.gather_params(parameters(model)):
            found["nested"] = all(torch.equal(model.get_parameter(n), full[n]) for n in NAMES)
        found["still full"] = all(torch.equal(model.get_parameter(n), full[n]) for n in NAMES)
    found["back"] = same(model, before)
    return found


def draws() -> dict[str, str]:
    """What is said of values that are drawn for shards, and for full parameters."""
    model = sharded()

    def draw(how: Callable[[Tensor], Any]) -> str:
        return raised_error(lambda: model.apply(lambda each: _each_matrix(each, how)))

    def reset() -> None:
        model.apply(lambda each: each.reset_parameters() if isinstance(each, nn.Linear) else None)

    found = {
        "torch.nn.init": draw(nn.init.xavier_uniform_),
        "handed over": draw(nn.init.kaiming_uniform_),
        "data": draw(lambda p: p.data.normal_()),
        "drawn elsewhere": draw(nn.init.orthogonal_),
        "set": draw(_set_to_drawn),
        "an index": draw(lambda p: p.data.__setitem__(slice(None), torch.randn(p.shape))),
        "copied": draw(lambda p: p.data.copy_(torch.randn(p.shape))),
        "reset": raised_error(reset),
        "other functions": draw(nn.init.zeros_),
    }
    with deepspeed_autotp.gather_params(model, modifier_rank=0):
        found["full"] = draw(nn.init.xavier_uniform_)
    return found


def _set_to_drawn(parameter: Tensor) -> None:
    parameter.data = torch.randn(parameter.shape)


def _each_matrix(module: nn.Module, how: Callable[[Tensor], Any]) -> None:
    for parameter in module.parameters(recurse=False):
        if parameter.dim() > 1:
            how(parameter)


def writes() -> dict[str, bool]:
    """The values of the modifier are kept, in the memory of the shards, those of others not."""
    model = sharded()
    before = local(model)
    state = deepspeed_autotp.full_state_dict(model)
    rank = dist.get_rank()
    with deepspeed_autotp.gather_params(parameters(model), modifier_rank=1), torch.no_grad():
        for parameter in parameters(model):
            parameter.mul_(2.0 + rank)
    after = deepspeed_autotp.full_state_dict(model)
    found = {
        "values": all(
            torch.equal(after[name], state[name] * (3.0 if name in NAMES else 1.0))
            for name in state
            if name != "lm_head.weight"
        ),
        "memory": all(p.data_ptr() == before[n][0] for n, p in model.named_parameters()),
    }
    with deepspeed_autotp.gather_params(model):
        with deepspeed_autotp.gather_params(model, modifier_rank=0), torch.no_grad():
            model.get_parameter(NORM).fill_(7)
            model.get_parameter(COLUMN).fill_(rank)
        found["seen outside"] = bool((model.get_parameter(COLUMN) == 0).all())
    found["nested"] = bool((model.get_parameter(NORM) == 7).all()) and bool(
        (model.get_parameter(COLUMN) == 0).all()
    )
    deepspeed_autotp.check_replicas(model)
    return found


def errors() -> dict[str, tuple[str, bool]]:
    """By what is wrong, the error, and whether the shards are as they were."""
    model = sharded()
    before = local(model)
    rank = dist.get_rank()

    def within(modifier: Any, work: Any, given: Any = None) -> tuple[str, bool]:
        def call() -> None:
            with deepspeed_autotp.gather_params(
                model if given is None else given, modifier_rank=modifier
            ):
                work()

        return raised_error(call), same(model, before)

    @torch.no_grad()
    def fail_on_one() -> None:
        for parameter in model.parameters():
            parameter.zero_()
        if rank == 1:
            raise KeyError("mine")

    def replace() -> None:
        model.get_parameter(COLUMN).data = torch.zeros(3)

    def nothing() -> None:
        pass

    return {
        "alone": within(None, fail_on_one),
        "together": within(0, fail_on_one),
        "a shape": within(0, replace),
        "a rank": within(7, nothing),
        "other ranks": within(rank, nothing),
        "a forward": within(None, lambda: model(tokens(0))),
        "a name": within(None, nothing, [COLUMN]),
        "not sharded": within(0, nothing, [nn.Parameter(torch.ones(2))]),
    }


def engine_writes(setting: Setting, extra: dict[str, Any]) -> dict[str, bool]:
    """Written values are those that the next step starts from: with a learning rate of 0 it keeps
    them, also where the optimizer has copies of its own."""
    model = build("llama", tied=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    config = engine_config(setting) | extra
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)
    train_engine(engine, tp=setting.tp, steps=1)
    state = deepspeed_autotp.full_state_dict(engine)
    found = {}
    with deepspeed_autotp.gather_params(engine):
        found["read"] = all(torch.equal(p, state[n]) for n, p in model.named_parameters())
    with deepspeed_autotp.gather_params(parameters(model), modifier_rank=1), torch.no_grad():
        for parameter in parameters(model):
            parameter[::2] *= 2.0 + dist.get_rank()
    written = deepspeed_autotp.full_state_dict(engine)
    for name, tensor in state.items():
        if name in NAMES:
            tensor[::2] *= 3.0
    state["lm_head.weight"] = state[EMBEDDING]
    found["values"] = all(torch.equal(written[name], tensor) for name, tensor in state.items())
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    ids = tokens(0).to(engine.device)
    engine.backward(engine(input_ids=ids[:1], labels=ids[:1]).loss)
    engine.step()
    kept = deepspeed_autotp.full_state_dict(engine)
    found["kept"] = all(torch.equal(kept[name], tensor) for name, tensor in state.items())
    deepspeed_autotp.check_replicas(engine)
    engine.destroy()
    return found
