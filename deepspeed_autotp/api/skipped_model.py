# SPDX-License-Identifier: Apache-2.0
"""An engine with TP groups around a model that the rules leave as it is.

Every rank of a TP group has all of the model, but for the shards of layers that are parallel by
themselves, as DeepSpeed's ``LinearLayer`` and ``LinearAllreduce``. These are recognised by their
marks, and are left alone; everything else is the same on all ranks, and stays so: its gradients are
full on each of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import nn

from deepspeed_autotp.checkpoint.atomic_folder import replaced
from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.deepspeed.checkpoints import save_every_shard
from deepspeed_autotp.interop.deepspeed.grad_norm import count_weights_once
from deepspeed_autotp.interop.deepspeed.groups import engine_group
from deepspeed_autotp.interop.deepspeed.kept_gradients import keep_gradients
from deepspeed_autotp.interop.deepspeed.loss_scale import refuse_own_scale
from deepspeed_autotp.interop.deepspeed.parameters import (
    is_partitioned,
    is_shard_of_others,
    remove_zero_partitioning,
)
from deepspeed_autotp.interop.deepspeed.save_16bit_model import save_gathered_weights
from deepspeed_autotp.sharding.weight_sync import sample_digest
from deepspeed_autotp.state.marked_norm import MarkedNorm
from deepspeed_autotp.state.replica_check import broadcast_rng_state

_log = logging.getLogger("deepspeed_autotp")

# How many names an error lists.
_NAMED = 3


def skip(model: nn.Module, tp_size: int, *, agreement: Agreement) -> None:
    """Make DeepSpeed's TP groups, and see to it that their ranks have the same model.

    All ranks of the run call it. ValueError on each of them where a tensor that is not marked as a
    shard has other values on another rank of its TP group.
    """
    agreement.together(lambda: _refuse_unready(model))
    remove_zero_partitioning(model.parameters())
    with closing(TPGroup(engine_group(tp_size=tp_size))) as group:
        local = agreement.within(group)
        samples = agreement.together(lambda: _samples(model))
        everyone = local.exchange(samples)
        agreement.together(lambda: _refuse_different(everyone, local))
        broadcast_rng_state(group, device=next(model.parameters()).device)
    if agreement.is_first:
        sharded = any(is_shard_of_others(p) for p in model.parameters())
        _log.warning(
            "the rules of tensor_parallel skip all of %s: %s",
            type(model).__name__,
            "only layers that are parallel by themselves have shards"
            if sharded
            else f"every one of the {tp_size} ranks of a TP group holds and computes all of it",
        )


def finish_skipped(engine: Any, model: nn.Module) -> None:
    """Let ``engine`` save full weights, count each weight once in the gradient norm, and have all
    gradients of a step."""
    save_gathered_weights(engine, replaced=replaced)
    save_every_shard(engine, tp_size=engine.autotp_size())
    if any(is_shard_of_others(p) for p in model.parameters()):
        refuse_own_scale(engine)
    handle = engine_group(tp_size=engine.autotp_size())
    norm = MarkedNorm(handle, device=engine.device)
    count_weights_once(engine, norm, clip=lambda most: norm.clip(model, most))
    keep_gradients(engine)


def _refuse_unready(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_partitioned(parameter) and is_shard_of_others(parameter):
            raise ValueError(
                f"{name} is a shard of a tensor-parallel layer of the model, and "
                "deepspeed.zero.Init has partitioned it over all ranks; build the model outside of "
                "zero.Init"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device, and the rules of tensor_parallel skip all of the "
                "model, so that no rank gets weights from another; load them on every rank"
            )


@torch.no_grad()
def _samples(model: nn.Module) -> dict[str, Any]:
    """Digests of what is no shard, by name."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: sample_digest([t]) for n, t in named.items() if not is_shard_of_others(t)}


def _refuse_different(everyone: Sequence[Mapping[str, Any]], local: Agreement) -> None:
    """ValueError where the ranks of a TP group have different samples."""
    names = {name for each in everyone for name in each}
    different = [name for name in sorted(names) if len({e.get(name) for e in everyone}) > 1]
    if different:
        raise ValueError(
            f"the ranks {list(local.ranks)} of a TP group have different values or shapes of "
            f"{', '.join(different[:_NAMED])}{', ...' if len(different) > _NAMED else ''}, and "
            "the rules of tensor_parallel skip all of the model, so that each would train its own: "
            "load or seed the model alike on them, and set tensor_model_parallel = True on "
            "parameters that are shards"
        )
