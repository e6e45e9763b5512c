# SPDX-License-Identifier: Apache-2.0
"""What the tests of meshes of two and three dimensions run on ranks."""

import gc
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import deepspeed_autotp
from tests.support.mesh_models import (
    OPTIMIZERS,
    blocks,
    copied,
    make,
    meshes,
    moved,
    prepare,
    replica_of,
    spread,
)
from tests.support.mesh_runs import MeshRun
from tests.support.small_models import tokens
from tests.support.training_loops import loss_of

ROWS = 8
STEPS = 3
CLIP = 0.3
Trained = tuple[list[float], list[float], dict[str, Tensor], dict[str, Tensor]]


def _clip(run: MeshRun, model: nn.Module, *, ours: bool) -> float:
    if run.clip == "value":
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        return 0.0
    if run.clip == "largest":
        return float(nn.utils.clip_grad_norm_(model.parameters(), CLIP / 100, float("inf")))
    if ours and run.clip == "ours":
        return float(deepspeed_autotp.clip_grad_norm_(model, CLIP))
    return float(nn.utils.clip_grad_norm_(model.parameters(), CLIP))


def _train(run: MeshRun, model: nn.Module, called: nn.Module, rank: int, replicas: int) -> Any:
    """Losses and norms of ``model``, called as ``called``, by the data-parallel rank."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[run.optimizer](trained)
    losses, norms = [], []
    parts = 2 if run.accumulate else 1
    for step in range(STEPS):
        for index, ids in enumerate(tokens(step, rows=ROWS).chunk(parts)):
            reduces = run.accumulate != "last" or index == parts - 1
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = reduces
            elif replicas > 1:
                model.set_requires_gradient_sync(reduces)
            loss = loss_of(called, ids.chunk(replicas)[rank]) / parts
            loss.backward()
            total = loss.detach().clone()
            if replicas > 1:
                dist.all_reduce(total)
                total /= dist.get_world_size()
            losses.append(float(total))
        norms.append(_clip(run, model, ours=replicas > 1))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def train_one(run: MeshRun) -> Trained:
    """Losses, norms and weights, before and after, in this process alone."""
    model = make(run)
    before = copied(model)
    losses, norms = _train(run, model, model, 0, 1)
    return losses, norms, before, copied(model)


def train(run: MeshRun) -> Trained:
    """As :func:`train_one`, on all ranks."""
    torch.compiler.reset()
    dp, tp = meshes(run)
    config = {"sequence_parallel": run.tokens == "sharded"}
    model = deepspeed_autotp.parallelize(make(run), mesh=tp, config=config)
    before = deepspeed_autotp.full_state_dict(model)
    prepare(run, model)
    model = spread(run, model, dp)
    called = model
    if run.compiled == "model":
        called = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    losses, norms = _train(run, model, called, replica_of(dp), dp.size())
    deepspeed_autotp.check_replicas(model)
    after = deepspeed_autotp.full_state_dict(model)
    assert deepspeed_autotp.checkpoint_state(model)["model"].state_dict().keys() == after.keys()
    return losses, norms, before, after


def _apart(got: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) / (abs(b) or 1.0) for a, b in zip(got, expected, strict=True))


def differences(got: Trained, expected: Trained) -> dict[str, float]:
    """Relative differences of losses, norms and weights."""
    return {
        "losses": _apart(got[0], expected[0]),
        "norms": _apart(got[1], expected[1]),
        "weights": moved(got[3], expected[3], expected[2]),
    }


def compare(runs: list[MeshRun]) -> list[dict[str, float] | str]:
    """The differences of each run to one process, or its error."""
    torch.set_num_threads(1)
    known: dict[Any, Trained] = {}
    found: list[dict[str, float] | str] = []
    for run in runs:
        alike = MeshRun(
            family=run.family,
            compiled="model" if run.compiled else "",
            clip="torch" if run.clip == "ours" else run.clip,
            optimizer=run.optimizer,
            accumulate=run.accumulate,
            trained=run.trained,
        )
        if alike not in known:
            known[alike] = train_one(alike)
        try:
            found.append(differences(train(run), known[alike]))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        gc.collect()
    return found


def dropout_losses(checkpoint: str, seed: int | None = None) -> list[float]:
    """Losses of this replica of a model with dropout, of which all are given the same rows; it is
    seeded by the number of the replica, or by ``seed``."""
    run = MeshRun(family="gpt2", checkpoint=checkpoint)
    dp, tp = meshes(run)
    model = make(run, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    model = deepspeed_autotp.parallelize(model, mesh=tp)
    prepare(run, model)
    model = spread(run, model, dp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    torch.manual_seed(dp.get_local_rank() if seed is None else seed)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, tokens(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def rounded(tp: int) -> list[dict[str, Tensor]]:
    """How far the weights move in three steps: in one process in float64, and with parameters in
    bfloat16 and gradients reduced in float32, by fully_shard alone or beside TP."""
    run = MeshRun(family="qwen3", tp=tp, optimizer="momentum")
    dp, of_tp = meshes(run)
    own, model = make(run), make(run).float()
    if tp > 1:
        model = deepspeed_autotp.parallelize(model, mesh=of_tp)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = spread(run, model, dp, mp_policy=policy)
    before = copied(own)
    _train(run, own, own, 0, 1)
    _train(run, model, model, dp.get_local_rank(), dp.size())
    full = deepspeed_autotp.full_state_dict(model)
    return [
        {name: after[name].double() - before[name] for name in before}
        for after in (copied(own), full)
    ]


def save_wrapped(folder: str) -> tuple[list[str], dict[str, Tensor]]:
    """Save a model whose blocks are wrapped; the names that iter_full_parameters has, and the full
    weights."""
    run = MeshRun(family="qwen3", checkpoint="wrapper", compiled="replaced blocks")
    model = deepspeed_autotp.parallelize(make(run), tp_size=2)
    prepare(run, model)
    deepspeed_autotp.save_pretrained(model, folder)
    names = [name for name, _ in deepspeed_autotp.iter_full_parameters(model)]
    return names, deepspeed_autotp.full_state_dict(model)


def right_after_all() -> dict[str, float]:
    """How far the weights are from those of one process after a step, of models that fully_shard
    has partitioned in other forms."""
    torch.set_num_threads(1)
    run = MeshRun(family="qwen3")
    dp, tp = meshes(run)

    def sharded(*, on_rank0: bool = False) -> nn.Module:
        with torch.device("meta" if on_rank0 and tp.get_local_rank() > 0 else "cpu"):
            model = make(run)
        return deepspeed_autotp.parallelize(model, mesh=tp)

    last = sharded()
    for each in (*blocks(last), last):
        fully_shard(each, mesh=dp, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    ignoring = sharded()
    ignored = {p for n, p in ignoring.named_parameters() if "q_norm" in n or "lm_head" in n}
    for each in (*blocks(ignoring), ignoring):
        fully_shard(each, mesh=dp, ignored_params=ignored)
    unsharded = spread(run, sharded(), dp)
    unsharded.unshard()
    models = {
        "the last dimension": last,
        "ignored parameters": ignoring,
        "unsharded before": unsharded,
        "replicate": replicate(sharded(), mesh=dp),
        "weights on rank 0": spread(run, sharded(on_rank0=True), dp),
    }
    own = make(run)
    before = copied(own)
    for model in (own, *models.values()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        loss_of(model, tokens(0)).backward()
        deepspeed_autotp.clip_grad_norm_(model, CLIP)
        optimizer.step()
    after = copied(own)
    return {
        name: moved(deepspeed_autotp.full_state_dict(model), after, before)
        for name, model in models.items()
    }
