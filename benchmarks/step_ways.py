# SPDX-License-Identifier: Apache-2.0
"""The ways to train one sharded model that benchmarks/step.py compares, each behind one form.

A way is a table row: who shards the model, and who runs the step. The package is imported only by
the ways that are its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import SGD

RATE = 0.1
REPLICAS = 2
Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Training:
    """A sharded model and the three parts of its step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    forward: Callable[[Batch], Tensor]
    backward: Callable[[Tensor], None]
    update: Callable[[], None]


def _plain(model: nn.Module) -> Training:
    optimizer = SGD(model.parameters(), lr=RATE)

    def backward(loss: Tensor) -> None:
        loss.backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Training(model, optimizer, lambda batch: model(**batch).loss, backward, update)


def _engine(
    initialize: Callable[..., Any], checkpoint: str, rows: int, **section: object
) -> Training:
    model = _loaded(checkpoint)
    config = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        "steps_per_print": 10**9,
        "tensor_parallel": {"autotp_size": dist.get_world_size(), **section},
    }
    engine, optimizer, *_ = initialize(
        model=model,
        model_parameters=model.parameters(),
        optimizer=lambda parameters: SGD(parameters, lr=RATE),
        config=config,
    )
    return Training(
        engine.module, optimizer, lambda batch: engine(**batch).loss, engine.backward, engine.step
    )


def _loaded(checkpoint: str, **options: object) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, **options
    )
    return model.train()


def _deepspeed(checkpoint: str, rows: int) -> Training:
    import deepspeed

    return _engine(deepspeed.initialize, checkpoint, rows)


def _deepspeed_vocabulary(checkpoint: str, rows: int) -> Training:
    """With the option that keeps the logits sharded in the loss; it is off by default."""
    import deepspeed

    return _engine(deepspeed.initialize, checkpoint, rows, vocab_parallel_lm_head=True)


def _transformers(checkpoint: str, rows: int) -> Training:
    from transformers.distributed import DistributedConfig

    plan = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    return _plain(_loaded(checkpoint, distributed_config=plan))


def _transformers_fsdp(checkpoint: str, rows: int) -> Training:
    from transformers.distributed import DistributedConfig

    tp_size = dist.get_world_size() // REPLICAS
    plan = DistributedConfig(tp_size=tp_size, tp_plan="auto", fsdp_size=REPLICAS)
    return _plain(_loaded(checkpoint, distributed_config=plan))


def _parallelize(checkpoint: str, rows: int, **section: object) -> Training:
    import deepspeed_autotp

    model = _loaded(checkpoint)
    tp_size = dist.get_world_size()
    return _plain(deepspeed_autotp.parallelize(model, tp_size=tp_size, config=section or None))


def _parallelize_in_turn(checkpoint: str, rows: int) -> Training:
    """Without sums of input gradients that are under way beside weight gradients."""
    return _parallelize(checkpoint, rows, tp_overlap_comm=False)


def _parallelize_logits(checkpoint: str, rows: int) -> Training:
    """With the logits of all tokens, sharded, where the loss is fused otherwise."""
    from deepspeed_autotp.vocab_parallel import head_product

    head_product.chunk_tokens = lambda widths, device: sys.maxsize
    return _parallelize(checkpoint, rows)


def _sequence_parallel(checkpoint: str, rows: int) -> Training:
    return _parallelize(checkpoint, rows, sequence_parallel=True)


def _parallelize_fsdp(checkpoint: str, rows: int) -> Training:
    from torch.distributed.fsdp import fully_shard

    import deepspeed_autotp

    shape = (REPLICAS, dist.get_world_size() // REPLICAS)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    model: Any = deepspeed_autotp.parallelize(_loaded(checkpoint), mesh=mesh["tp"])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return _plain(model)


def _initialize(checkpoint: str, rows: int) -> Training:
    import deepspeed_autotp

    return _engine(deepspeed_autotp.initialize, checkpoint, rows)


@dataclass(frozen=True, slots=True)
class Way:
    """``build`` takes the folder of a full checkpoint and the rows of a batch. ``is_own``: it is of
    this package. ``replicas``: how many it has of the TP group, with the same batches."""

    label: str
    build: Callable[[str, int], Training]
    is_own: bool = False
    replicas: int = 1


WAYS: Mapping[str, Way] = {
    "deepspeed": Way("DeepSpeed AutoTP", _deepspeed),
    "deepspeed-vocabulary": Way("DeepSpeed, sharded logits", _deepspeed_vocabulary),
    "transformers": Way("transformers TP", _transformers),
    "parallelize": Way("ours, parallelize", _parallelize, is_own=True),
    "parallelize-in-turn": Way("ours, no overlap", _parallelize_in_turn, is_own=True),
    "parallelize-logits": Way("ours, loss not fused", _parallelize_logits, is_own=True),
    "sequence-parallel": Way("ours, sequence parallel", _sequence_parallel, is_own=True),
    "initialize": Way("ours, initialize", _initialize, is_own=True),
    "transformers-fsdp": Way("transformers TP x FSDP", _transformers_fsdp, replicas=REPLICAS),
    "fsdp": Way("ours, fully_shard", _parallelize_fsdp, is_own=True, replicas=REPLICAS),
}
