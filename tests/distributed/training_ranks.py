# SPDX-License-Identifier: Apache-2.0
"""Training around ``parallelize``, each way against one process."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import deepspeed_autotp
from tests.support.loss_curves import RATE
from tests.support.small_models import build, tokens
from tests.support.training_loops import (
    CLIP,
    SHAPES,
    STEPS,
    apart,
    loss_of,
    make,
    train_sharded,
    train_unsharded,
)


def compare(
    changes: dict[str, Any],
    accumulate: int = 1,
    prepare: Callable[[nn.Module], None] = lambda model: None,
) -> dict[str, float]:
    """Train both, unsharded and sharded over all ranks."""
    unsharded, sharded = make(**changes), make(**changes)
    prepare(unsharded)
    prepare(sharded)
    deepspeed_autotp.parallelize(sharded, tp_size=dist.get_world_size())
    expected = train_unsharded(unsharded, accumulate=accumulate)
    return apart(unsharded, sharded, (expected, train_sharded(sharded, accumulate=accumulate)))


def compare_shape(name: str) -> tuple[dict[str, float], bool]:
    """And whether several ranks hold a key/value head."""
    found = compare(dict(SHAPES[name]))
    heads = SHAPES[name].get("num_key_value_heads", 4)
    return found, heads < dist.get_world_size()


def compare_checkpointed(reentrant: bool) -> dict[str, float]:
    """With activations computed twice, also of key/value heads that ranks share."""

    def prepare(model: nn.Module) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    return compare({"num_key_value_heads": 1}, prepare=prepare)


def freeze(model: nn.Module, frozen: bool) -> None:
    """One weight of each kind: embedding, column with shared heads, row, norm, head."""
    layer = model.model.layers[0]
    for module in (
        model.model.embed_tokens,
        layer.self_attn.k_proj,
        layer.mlp.down_proj,
        layer.input_layernorm,
        model.lm_head,
    ):
        module.weight.requires_grad_(not frozen)


def compare_frozen() -> tuple[bool, dict[str, float], dict[str, float]]:
    """Whether what is frozen stays as it is, and the distances before and after it thaws."""
    unsharded, sharded = make(num_key_value_heads=1), make(num_key_value_heads=1)
    freeze(unsharded, True)
    freeze(sharded, True)
    deepspeed_autotp.parallelize(sharded, tp_size=dist.get_world_size())
    flags = [p.requires_grad for p in sharded.parameters()]
    assert flags == [p.requires_grad for p in unsharded.parameters()] and flags.count(False) == 5
    before = {n: p.detach().clone() for n, p in sharded.named_parameters() if not p.requires_grad}
    frozen = apart(unsharded, sharded, (train_unsharded(unsharded), train_sharded(sharded)))
    kept = all(torch.equal(p, before[n]) for n, p in sharded.named_parameters() if n in before)
    kept = kept and all(p.grad is None for n, p in sharded.named_parameters() if n in before)
    freeze(unsharded, False)
    freeze(sharded, False)
    return (
        kept,
        frozen,
        apart(unsharded, sharded, (train_unsharded(unsharded), train_sharded(sharded))),
    )


def compare_autocast(sequence: bool) -> tuple[float, float]:
    """Worst loss differences in bfloat16: parallelized within autocast and before it."""
    context = torch.autocast("cpu", dtype=torch.bfloat16)
    config = {"sequence_parallel": sequence}
    with context:
        expected, _ = train_unsharded(build("llama", tied=False))
        inside = build("llama", tied=False)
        within, _ = train_sharded(deepspeed_autotp.parallelize(inside, tp_size=2, config=config))
    outside = deepspeed_autotp.parallelize(build("llama", tied=False), tp_size=2, config=config)
    with context:
        before, _ = train_sharded(outside)
    first, second = (
        max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        for losses in (within, before)
    )
    return first, second


def compare_with_data_parallel() -> dict[str, float]:
    """TP 2 x DP 2 over one mesh: each data-parallel replica has its half of the rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    unsharded, sharded = make(num_key_value_heads=1), make(num_key_value_heads=1)
    deepspeed_autotp.parallelize(sharded, mesh=mesh)
    assert deepspeed_autotp.tensor_parallel(sharded).group.global_ranks == tuple(
        dist.get_process_group_ranks(mesh["tp"].get_group())
    )
    model = DistributedDataParallel(sharded, process_group=mesh["dp"].get_group())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses, norms = [], []
    for step in range(STEPS):
        ids = tokens(step).chunk(2)[mesh["dp"].get_local_rank()]
        loss = loss_of(model, ids)
        loss.backward()
        norms.append(float(deepspeed_autotp.clip_grad_norm_(model, CLIP).detach()))
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    found = apart(unsharded, model, (train_unsharded(unsharded), (losses, norms)))
    states: list[Any] = [None] * 4
    dist.all_gather_object(states, list(deepspeed_autotp.full_state_dict(model).values()))
    found["replicas"] = max(
        float((a - b).abs().max()) for s in states for a, b in zip(s, states[0], strict=True)
    )
    return found
