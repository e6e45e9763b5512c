# SPDX-License-Identifier: Apache-2.0
"""The ways to train one sharded model that benchmarks/step.py compares, each behind one form.

A way is a table row: who shards the model, and who runs the step. The package is imported only by
the ways that are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD

RATE = 0.1
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


def _parallelize(checkpoint: str, rows: int, **section: object) -> Training:
    import deepspeed_autotp

    model = _loaded(checkpoint)
    tp_size = dist.get_world_size()
    return _plain(deepspeed_autotp.parallelize(model, tp_size=tp_size, config=section or None))


def _parallelize_in_turn(checkpoint: str, rows: int) -> Training:
    """Without sums of input gradients that are under way beside weight gradients."""
    return _parallelize(checkpoint, rows, tp_overlap_comm=False)


def _initialize(checkpoint: str, rows: int) -> Training:
    import deepspeed_autotp

    return _engine(deepspeed_autotp.initialize, checkpoint, rows)


# A way takes the folder of a full checkpoint and the rows of a batch.
WAYS: Mapping[str, Callable[[str, int], Training]] = {
    "deepspeed": _deepspeed,
    "deepspeed-vocabulary": _deepspeed_vocabulary,
    "transformers": _transformers,
    "parallelize": _parallelize,
    "parallelize-in-turn": _parallelize_in_turn,
    "initialize": _initialize,
}
OWN = ("parallelize", "parallelize-in-turn", "initialize")
LABELS: Mapping[str, str] = {
    "deepspeed": "DeepSpeed AutoTP",
    "deepspeed-vocabulary": "DeepSpeed, sharded logits",
    "transformers": "transformers TP",
    "parallelize": "ours, parallelize",
    "parallelize-in-turn": "ours, no overlap",
    "initialize": "ours, initialize",
}
