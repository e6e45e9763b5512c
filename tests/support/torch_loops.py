# SPDX-License-Identifier: Apache-2.0
"""Plain training loops around ``parallelize``, each against one process, in float64."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import deepspeed_autotp
from tests.support.deepspeed_training import RATE
from tests.support.small_models import build, tokens

STEPS = 5
CLIP = 0.5


def make(**changes: Any) -> nn.Module:
    """A llama in float64."""
    return build("llama", tied=changes.pop("tied", False), **changes).double()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """As the model computes it with labels, but in float64."""
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(
    model: nn.Module, clip: Callable[[float], Tensor], *, steps: int = STEPS, accumulate: int = 1
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of SGD on the whole batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    losses, norms = [], []
    for step in range(steps):
        total = 0.0
        for ids in tokens(step, vocabulary=inner.config.vocab_size).chunk(accumulate):
            loss = loss_of(model, ids) / accumulate
            loss.backward()
            total += float(loss.detach())
        norms.append(float(clip(CLIP).detach()))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms


def train_whole(model: nn.Module, **more: Any) -> tuple[list[float], list[float]]:
    parameters = list(model.parameters())
    return train(model, lambda most: torch.nn.utils.clip_grad_norm_(parameters, most), **more)


def train_sharded(model: nn.Module, **more: Any) -> tuple[list[float], list[float]]:
    return train(model, lambda most: deepspeed_autotp.clip_grad_norm_(model, most), **more)


def apart(
    whole: nn.Module,
    sharded: nn.Module,
    curves: tuple[tuple[list[float], list[float]], tuple[list[float], list[float]]],
) -> dict[str, float]:
    """Largest differences of the losses, of the norms, and of the weights."""
    (losses, norms), (own_losses, own_norms) = curves
    weights = deepspeed_autotp.full_state_dict(sharded)
    deepspeed_autotp.check_replicas(sharded)
    return {
        "loss": max(abs(a - b) for a, b in zip(own_losses, losses, strict=True)),
        "norm": max(abs(a - b) for a, b in zip(own_norms, norms, strict=True)),
        "weights": max(float((weights[n] - t).abs().max()) for n, t in whole.state_dict().items()),
    }


def compare(
    changes: dict[str, Any],
    accumulate: int = 1,
    prepare: Callable[[nn.Module], None] = lambda model: None,
) -> dict[str, float]:
    """The whole way: train both, whole and sharded over all ranks."""
    whole, sharded = make(**changes), make(**changes)
    prepare(whole)
    prepare(sharded)
    deepspeed_autotp.parallelize(sharded, tp_size=dist.get_world_size())
    expected = train_whole(whole, accumulate=accumulate)
    return apart(whole, sharded, (expected, train_sharded(sharded, accumulate=accumulate)))


SHAPES: dict[str, dict[str, Any]] = {
    "8 heads, 2 keys": {"num_key_value_heads": 2},
    "8 heads, 1 key": {"num_key_value_heads": 1},
    "12 heads, 3 keys": {
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
        "hidden_size": 96,
    },
    "6 heads": {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 60},
    "uneven vocabulary": {"vocab_size": 257},
    "uneven vocabulary, tied": {"vocab_size": 257, "tied": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
}


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
    whole, sharded = make(num_key_value_heads=1), make(num_key_value_heads=1)
    freeze(whole, True)
    freeze(sharded, True)
    deepspeed_autotp.parallelize(sharded, tp_size=dist.get_world_size())
    flags = [p.requires_grad for p in sharded.parameters()]
    assert flags == [p.requires_grad for p in whole.parameters()] and flags.count(False) == 5
    before = {n: p.detach().clone() for n, p in sharded.named_parameters() if not p.requires_grad}
    frozen = apart(whole, sharded, (train_whole(whole), train_sharded(sharded)))
    kept = all(torch.equal(p, before[n]) for n, p in sharded.named_parameters() if n in before)
    kept = kept and all(p.grad is None for n, p in sharded.named_parameters() if n in before)
    freeze(whole, False)
    freeze(sharded, False)
    return kept, frozen, apart(whole, sharded, (train_whole(whole), train_sharded(sharded)))


def compare_autocast(sequence: bool) -> tuple[float, float]:
    """Worst loss differences in bfloat16: parallelized within autocast and before it."""
    context = torch.autocast("cpu", dtype=torch.bfloat16)
    config = {"sequence_parallel": sequence}
    with context:
        expected, _ = train_whole(build("llama", tied=False))
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
    """TP 2 x DP 2 over one mesh: each replica of the model takes its half of the rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole, sharded = make(num_key_value_heads=1), make(num_key_value_heads=1)
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
    found = apart(whole, model, (train_whole(whole), (losses, norms)))
    states: list[Any] = [None] * 4
    dist.all_gather_object(states, list(deepspeed_autotp.full_state_dict(model).values()))
    found["replicas"] = max(
        float((a - b).abs().max()) for s in states for a, b in zip(s, states[0], strict=True)
    )
    return found


def meshes() -> dict[str, tuple[int, ...] | str]:
    """Over which ranks each way of naming four ranks shards, or what it raises."""
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = groups[dist.get_rank() % 2]
    other = groups[1 - dist.get_rank() % 2]
    ways: dict[str, dict[str, Any]] = {
        "tp_size": {"tp_size": 2},
        "config": {"config": {"autotp_size": 4}},
        "group": {"tp_group": mine},
        "group of others": {"tp_group": other},
        "group and its size": {"tp_group": mine, "config": {"autotp_size": 2}},
        "mesh of one": {"mesh": init_device_mesh("cpu", (4,))},
        "mesh of two": {"mesh": pairs},
        "its other part": {"mesh": pairs["dp"]},
        "no name": {"mesh": init_device_mesh("cpu", (2, 2))},
        "other names": {"mesh": DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("a", "b"))},
        "no mesh": {"mesh": 4},
    }
    found: dict[str, tuple[int, ...] | str] = {}
    for name, arguments in ways.items():
        model = build("llama", tied=False)
        try:
            deepspeed_autotp.parallelize(model, **arguments)
            found[name] = deepspeed_autotp.tensor_parallel(model).group.global_ranks
        except ValueError as error:
            found[name] = str(error)
    return found
