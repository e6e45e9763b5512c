# SPDX-License-Identifier: Apache-2.0
"""A model built under deepspeed.zero.Init is gathered, planned, and sharded like any other."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.engine_config import Setting, engine_config
from tests.support.loss_curves import RATE, single_losses, train_engine, worst_difference
from tests.support.small_models import build
from tests.support.worker_pool import Pool


def build_partitioned(family: str, weights: dict[str, Tensor], *, tied: bool) -> nn.Module:
    """A model whose weights are spread over all ranks, as large models are built for ZeRO 3."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = build(family, tied=tied)
    parameters = list(model.parameters())
    assert {p.numel() for p in parameters} == {0}
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        if dist.get_rank() == 0:
            model.load_state_dict(weights)
    return model


def train_partitioned(family: str, tied: bool, setting: Setting) -> dict[str, Any]:
    import deepspeed_autotp
    from deepspeed_autotp.interop.deepspeed.parameters import remove_zero_partitioning

    plain = build(family, tied=tied)
    weights = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    ordinary = [set(vars(p)) for p in plain.parameters()]
    expected = single_losses(plain, clip=setting.clip)

    model = build_partitioned(family, weights, tied=tied)
    remove_zero_partitioning(model.parameters())
    left = [set(vars(p)) for p in model.parameters()]
    shapes = [p.shape for p in model.parameters()] == [p.shape for p in plain.parameters()]

    model = build_partitioned(family, weights, tied=tied)
    identities = [id(p) for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine, *_ = deepspeed_autotp.initialize(
        model=model, optimizer=optimizer, config=engine_config(setting)
    )
    full = deepspeed_autotp.full_state_dict(engine)
    return {
        "nothing of ZeRO is left": left == ordinary,
        "shapes": shapes,
        "identities": [id(p) for p in model.parameters()] == identities,
        "weights": all(torch.equal(full[name], weights[name]) for name in weights),
        "losses": worst_difference(train_engine(engine, tp=setting.tp), expected) <= 1e-5,
    }


@pytest.mark.parametrize(
    ("family", "tied", "zero"), [("llama", False, 3), ("qwen2", True, 3), ("llama", True, 1)]
)
def test_model_of_zero_init_trains_like_one_process(
    pool: Pool, family: str, tied: bool, zero: int
) -> None:
    setting = Setting(tp=2, zero=zero, clip=1.0)
    for found in pool.run(train_partitioned, family, tied, setting, ranks=4):
        assert all(found.values()), found
