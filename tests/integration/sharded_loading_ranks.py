# SPDX-License-Identifier: Apache-2.0
"""An engine on a model of which each rank has loaded its own shards."""

from typing import Any

import torch.distributed as dist

import deepspeed_autotp
from tests.support.engine_config import Setting, engine_config
from tests.support.loss_curves import sgd, single_losses, train_engine, worst_difference
from tests.support.raised_error import raised_error
from tests.support.small_models import build


def _sharded(folder: str, **config: Any) -> Any:
    from transformers import LlamaForCausalLM

    model = deepspeed_autotp.from_pretrained(LlamaForCausalLM, folder, tp_size=2, config=config)
    return model.train()


def trains(folder: str, zero: int) -> float:
    """The largest difference of a loss from those of one process."""
    from transformers import LlamaForCausalLM

    if dist.get_rank() == 0:
        build("llama", tied=True).save_pretrained(folder)  # type: ignore[operator]
    dist.barrier()
    alone = LlamaForCausalLM.from_pretrained(folder).train()
    expected = single_losses(alone, clip=1.0)
    model = _sharded(folder)
    config = engine_config(Setting(tp=2, zero=zero, clip=1.0))
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=sgd(model), config=config)
    return worst_difference(train_engine(engine, tp=2), expected)


def other_rules(folder: str) -> list[str]:
    """What ``initialize`` says to a model of other rules, of another size, and of the same."""
    if dist.get_rank() == 0:
        build("llama", tied=False).save_pretrained(folder)  # type: ignore[operator]
    dist.barrier()
    model = _sharded(folder, preset_model="llama")
    said = []
    for section in (
        {"preset_model": "qwen2"},
        {"tp": {"tp_grain_size": 32}},
        {"autotp_size": 1},
        {"preset_model": "llama"},
    ):
        config = engine_config(Setting(tp=2, zero=0, clip=0.0))
        config["tensor_parallel"] = {"autotp_size": 2, **section}
        said.append(
            raised_error(
                lambda config=config: deepspeed_autotp.initialize(  # type: ignore[misc]
                    model=model, optimizer=sgd(model), config=config
                )
            )
        )
    return said
