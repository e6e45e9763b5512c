# SPDX-License-Identifier: Apache-2.0
"""What ran before a model is sharded does not reach into what is trained after it."""

from typing import Any

import torch
import torch.distributed as dist

import deepspeed_autotp
from tests.support.loss_curves import single_losses, worst_difference
from tests.support.small_models import build, tokens
from tests.support.worker_pool import Pool


def train_behind_a_graph() -> float:
    """The worst loss difference where a loss of the unsharded model is still there."""
    expected = single_losses(build("llama", tied=True), clip=0.0)
    model: Any = build("llama", tied=True)
    kept = model(input_ids=tokens(0), labels=tokens(0)).loss
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    losses = single_losses(model, clip=0.0)
    assert float(kept.detach()) == expected[0]
    return worst_difference(losses, expected)


def build_rwkv() -> Any:
    """With ``use_cache``, as it is by default: the state is written to in the forward, and torch
    never frees such a graph."""
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    return RwkvForCausalLM(RwkvConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2)).train()


def train_rwkv() -> tuple[float, int, int]:
    """The worst loss difference, and how many elements this rank and one process hold."""
    unsharded, model = build_rwkv(), build_rwkv()
    size = sum(p.numel() for p in unsharded.parameters())
    expected = single_losses(unsharded, clip=0.0)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    own = sum(p.numel() for p in model.parameters())
    return worst_difference(single_losses(model, clip=0.0), expected), own, size


def test_a_graph_of_the_unsharded_model_does_not_refuse_gradients_of_shards(pool: Pool) -> None:
    assert max(pool.run(train_behind_a_graph)) < 1e-5


def test_a_model_that_writes_to_its_state_is_tried_without_it(pool: Pool) -> None:
    for worst, own, size in pool.run(train_rwkv):
        assert worst < 1e-5
        assert own < 0.6 * size
