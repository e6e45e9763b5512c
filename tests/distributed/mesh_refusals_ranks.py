# SPDX-License-Identifier: Apache-2.0
"""Meshes, orders of calls and ways of saving that are refused, to be run on ranks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import deepspeed_autotp
from tests.support.mesh_models import blocks, make, meshes, spread
from tests.support.mesh_runs import MeshRun
from tests.support.raised_error import raised_error
from tests.support.small_models import tokens
from tests.support.training_loops import loss_of

RUN = MeshRun(family="llama", compiled="model")  # of one layer
Calls = dict[str, Callable[[], Any]]


def refusals(folder: str) -> dict[str, str]:
    """What is refused, by what was called."""
    torch.set_num_threads(1)
    calls = _of_order() | _of_meshes() | _of_saving(folder) | _of_norms()
    return {key: raised_error(call) for key, call in calls.items()}


def _sharded() -> nn.Module:
    return deepspeed_autotp.parallelize(make(RUN), mesh=meshes(RUN)[1])


def _of_order() -> Calls:
    dp, tp = meshes(RUN)
    wrapped = make(RUN)
    own = set(blocks(wrapped))
    apply_activation_checkpointing(wrapped, check_fn=lambda module: module in own)
    parted = fully_shard(make(RUN), mesh=dp)
    replicated = DistributedDataParallel(make(RUN), process_group=dp.get_group())

    def optimizer_first() -> None:
        model = _sharded()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_of(spread(RUN, model, dp), tokens(0)).backward()
        deepspeed_autotp.clip_grad_norm_(model, 1.0)
        optimizer.step()

    return {
        "fully_shard first": lambda: deepspeed_autotp.parallelize(parted, mesh=tp),
        "DDP first": lambda: deepspeed_autotp.parallelize(replicated, mesh=tp),
        "wrapper first": lambda: deepspeed_autotp.parallelize(wrapped, mesh=tp),
        "optimizer first": optimizer_first,
    }


def _of_meshes() -> Calls:
    def later() -> None:
        model = _sharded()
        with torch.no_grad():
            model(input_ids=tokens(0))
        DistributedDataParallel(model)(input_ids=tokens(0))

    def compiled() -> None:
        model = DistributedDataParallel(_sharded())
        model.module.compile(backend="eager")
        model(input_ids=tokens(0))

    def shards_of_one_rank() -> None:
        model = _sharded()
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)
        model(input_ids=tokens(0))

    def around() -> None:
        model = fully_shard(nn.Sequential(_sharded()), mesh=meshes(RUN)[0])
        model(tokens(0))

    return {
        "fully_shard around": around,
        "DDP over TP ranks": lambda: DistributedDataParallel(_sharded())(input_ids=tokens(0)),
        "DDP over TP ranks, later": later,
        "DDP over TP ranks, compiled": compiled,
        "shards of one rank": shards_of_one_rank,
    }


def _of_saving(folder: str) -> Calls:
    model = spread(RUN, _sharded(), meshes(RUN)[0])
    return {
        "get_model_state_dict": lambda: get_model_state_dict(model),
        "save": lambda: dcp.save({"model": model}, checkpoint_id=folder),  # type: ignore[dict-item]
    }


def _of_norms() -> Calls:
    one, other, infinite = (_sharded() for _ in range(3))
    for model in (one, other, infinite):
        loss_of(model, tokens(0)).backward()
    if dist.get_rank() % 2:
        gradient = next(p.grad for p in infinite.parameters() if p.grad is not None)
        gradient.view(-1)[0] = torch.inf
    clip = nn.utils.clip_grad_norm_
    return {
        "norm of two models": lambda: clip([*one.parameters(), *other.parameters()], 1.0),
        "norm type": lambda: clip(one.parameters(), 1.0, 0),
        "norm, not finite": lambda: clip(infinite.parameters(), 1.0, error_if_nonfinite=True),
    }
