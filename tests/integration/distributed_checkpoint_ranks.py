# SPDX-License-Identifier: Apache-2.0
"""What the tests of torch.distributed.checkpoint run on ranks: a plain loop, saved and resumed."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import deepspeed_autotp
from tests.support.engine_config import initialize
from tests.support.raised_error import raised_error
from tests.support.small_models import build, tokens
from tests.support.training_loops import loss_of

RATE = 0.01
CLIP = 0.3
ROWS = 12  # of a step: one, two, three or four data-parallel replicas share them


@dataclass(frozen=True)
class Case:
    """A model in float64, as tests.support.small_models makes it."""

    family: str = "llama"
    tied: bool = True
    changes: dict[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        model = build(self.family, tied=self.tied, **self.changes).double()
        model.set_experts_implementation("eager")  # grouped products have no float64
        return model


@dataclass(frozen=True)
class Size:
    """How a run is spread over its ranks; ``way`` is what averages gradients over replicas: with
    "hsdp" blocks are wrapped for activation checkpointing, too."""

    tp: int = 1
    dp: int = 1
    way: str = "ddp"

    @property
    def ranks(self) -> int:
        return self.tp * self.dp


@dataclass(frozen=True)
class Steps:
    """Steps ``begin`` to ``end``: from the checkpoint ``load``, and then into ``save``."""

    begin: int
    end: int
    load: str | None = None
    save: str | None = None
    is_async: bool = False


def rate(step: int) -> float:
    """The learning rate of a step, with a warm-up."""
    return RATE * min(1.0, (step + 1) / 4)


class Loop:
    """A model, its optimizer and a schedule with a warm-up on this rank."""

    def __init__(self, case: Case, size: Size) -> None:
        replicas, names = (size.dp,), ("dp",)
        if size.way == "hsdp":
            replicas, names = (2, size.dp // 2), ("dp_replicate", "dp_shard")
        mesh = init_device_mesh("cpu", (*replicas, size.tp), mesh_dim_names=(*names, "tp"))
        torch.set_num_threads(1)
        self.replica, self.replicas = dist.get_rank() // size.tp, size.dp
        sharded = deepspeed_autotp.parallelize(case.make(), mesh=mesh["tp"])
        self.model = spread(sharded, mesh[names], size.way)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: rate(step) / RATE
        )
        self.state = deepspeed_autotp.checkpoint_state(self.model, self.optimizer)
        self.state["schedule"] = self.schedule

    def step(self, index: int) -> float:
        """The loss of all replicas."""
        ids = tokens(index, rows=ROWS).chunk(self.replicas)[self.replica]
        loss = loss_of(self.model, ids)
        loss.backward()
        deepspeed_autotp.clip_grad_norm_(self.model, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return float(total / dist.get_world_size())


def spread(model: nn.Module, mesh: DeviceMesh, way: str) -> nn.Module:
    """A sharded model over the data-parallel replicas of ``mesh``."""
    if way == "hsdp":
        own = set(model.model.layers)
        apply_activation_checkpointing(model, check_fn=lambda module: module in own)
    if way in ("fsdp", "hsdp"):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    if mesh.size() == 1:
        return model
    return DistributedDataParallel(model, process_group=mesh.get_group())


def run(case: Case, size: Size, steps: Steps) -> list[float]:
    """The losses of a run, or of what goes on from a checkpoint."""
    loop = Loop(case, size)
    if steps.load is not None:
        dcp.load(loop.state, checkpoint_id=steps.load)
    losses = [loop.step(index) for index in range(steps.begin, steps.end)]
    if size.tp > 1:
        deepspeed_autotp.check_replicas(loop.model)
    if steps.save is not None and steps.is_async:
        # A thread writes: its collectives have a group of their own, beside those of the steps.
        group = dist.new_group()
        saved = dcp.async_save(loop.state, checkpoint_id=steps.save, process_group=group)
        losses.append(loop.step(steps.end))
        saved.result()
    elif steps.save is not None:
        dcp.save(loop.state, checkpoint_id=steps.save)
    return losses


def save_with_full_state(case: Case, size: Size, folder: str) -> dict[str, torch.Tensor]:
    """Save a run of two steps; its full weights."""
    loop = Loop(case, size)
    for index in range(2):
        loop.step(index)
    dcp.save(loop.state, checkpoint_id=folder)
    return deepspeed_autotp.full_state_dict(loop.model)


def load_twice(case: Case, size: Size, folder: str) -> int:
    """Load into a run that has been stepped, too; how many tensors then differ bitwise from a run
    that has not."""
    loops = [Loop(case, size), Loop(case, size)]
    loops[0].step(7)
    for loop in loops:
        dcp.load(loop.state, checkpoint_id=folder)
    stepped, fresh = (_tensors(loop.state) for loop in loops)
    assert stepped.keys() == fresh.keys()
    assert loops[0].schedule.state_dict() == loops[1].schedule.state_dict()
    return sum(not torch.equal(stepped[name], fresh[name]) for name in stepped)


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    model, optimizer = state["model"].state_dict(), state["optimizer"].state_dict()
    found = {
        name: value.shard if hasattr(value, "shard") else value for name, value in model.items()
    }
    for name, states in optimizer["state"].items():
        for key, value in states.items():
            found[f"{name} {key}"] = value.shard if hasattr(value, "shard") else value
    return found


def save_the_optimizer_after_evaluating(case: Case, size: Size, folder: str) -> int:
    """After a forward without a backward, the optimizer alone; how many states are saved."""
    loop = Loop(case, size)
    loop.step(0)
    with torch.no_grad():
        loop.model(input_ids=tokens(1))
    dcp.save({"optimizer": loop.state["optimizer"]}, checkpoint_id=folder)
    return len(loop.state["optimizer"].state_dict()["state"])


def save_before_the_first_step(case: Case, size: Size, folder: str) -> list[float]:
    """The losses of a run that was saved at its start, and whose optimizer is left as it was."""
    loop = Loop(case, size)
    dcp.save(loop.state, checkpoint_id=folder)
    assert not loop.optimizer.state
    return [loop.step(index) for index in range(3)]


def load_other(case: Case, folder: str) -> None:
    loop = Loop(case, Size(2))
    before = [parameter.detach().clone() for parameter in loop.model.parameters()]
    try:
        dcp.load(loop.state, checkpoint_id=folder)
    finally:
        after = list(loop.model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class ScaledRows(torch.optim.Optimizer):
    """Steps of rows by what has been seen of each: states of another shape than the parameter."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": RATE})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                seen = self.state[parameter].setdefault("seen", parameter.new_zeros(len(parameter)))
                seen += parameter.grad.flatten(1).abs().sum(1) if parameter.dim() > 1 else 0.0


def refused() -> dict[str, str]:
    """What checkpoint_state refuses, by what it was given."""
    case = Case()
    model = deepspeed_autotp.parallelize(case.make(), tp_size=2)
    engine, *_ = initialize(build("llama", tied=True), {"autotp_size": 2})
    parted = deepspeed_autotp.parallelize(case.make(), tp_size=2)
    early = torch.optim.SGD(parted.parameters(), lr=RATE)
    fully_shard(parted, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))["dp"])
    counted = torch.optim.SGD(model.parameters(), lr=RATE)
    counted.state["seen"] = 3  # type: ignore[index]
    given: dict[str, tuple[Any, Any]] = {
        "no model": ("model", None),
        "an engine": (engine, None),
        "the module of an engine": (engine.module, None),
        "no optimizer": (model, "adamw"),
        "an optimizer of another model": (model, torch.optim.SGD(case.make().parameters())),
        "an optimizer made before fully_shard": (parted, early),
        "Adafactor": (model, torch.optim.Adafactor(model.parameters())),
        "states of rows": (model, ScaledRows(model.parameters())),
        "a state of no parameter": (model, counted),
    }
    state = deepspeed_autotp.checkpoint_state(model)["model"]
    loaded = raised_error(lambda: state.load_state_dict(case.make().state_dict()))
    return {"tensors of others": loaded} | {
        key: raised_error(lambda what=what: deepspeed_autotp.checkpoint_state(*what))  # type: ignore[misc]
        for key, what in given.items()
    }


class Counter(nn.Module):
    """Its number is saved as a tensor."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self.number])

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.number = int(state)


def load_what_modules_give(folder: str) -> tuple[int, list[str], str]:
    """A number that a module gives as a tensor, which weights differ where hooks give copies of
    them, and the error where one gives a tensor of its own."""

    def make(number: int) -> nn.Module:
        model = Case().make()
        model.counter = Counter(number)
        for parameter in model.parameters():
            parameter.data.mul_(number)
        model = deepspeed_autotp.parallelize(model, tp_size=2)
        for module in model.modules():
            module.register_state_dict_post_hook(_copies)
        return model

    saved, loaded = make(3), make(1)
    dcp.save(deepspeed_autotp.checkpoint_state(saved), checkpoint_id=folder)
    dcp.load(deepspeed_autotp.checkpoint_state(loaded), checkpoint_id=folder)
    pairs = zip(saved.named_parameters(), loaded.parameters(), strict=True)
    wrong = [name for (name, one), other in pairs if not torch.equal(one, other)]
    saved.register_state_dict_post_hook(_adds)
    return (
        loaded.counter.number,
        wrong,
        raised_error(lambda: deepspeed_autotp.checkpoint_state(saved)),
    )


def _copies(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, _parameter in module.named_parameters(recurse=False):
        state[prefix + name] = state[prefix + name].detach().clone()


def _adds(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state["half"] = state["lm_head.weight"] / 2


def load_in_other_groups(case: Case, folder: str) -> str:
    """Save, and load into an optimizer that has its parameters in another order."""
    loop = Loop(case, Size(2))
    dcp.save(loop.state, checkpoint_id=folder)
    backwards = torch.optim.AdamW(list(loop.model.parameters())[::-1], lr=RATE)
    state = deepspeed_autotp.checkpoint_state(loop.model, backwards)
    return raised_error(lambda: dcp.load(state, checkpoint_id=folder))
