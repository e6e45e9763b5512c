# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as DeepSpeed's engine saves it without ZeRO, made without an engine."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from deepspeed_autotp._core import Plan
from deepspeed_autotp.checkpoint.metadata import NAME, write_metadata
from deepspeed_autotp.state.sharded_model import shard_of
from tests.support.core_llama import llama, preset

RANKS = 2


def plan() -> Plan:
    return Plan(llama(layers=1), preset(), ranks=RANKS)


def full_weights() -> dict[str, torch.Tensor]:
    """Each parameter by its name, with values of its own."""
    made: dict[str, torch.Tensor] = {}
    for entry in plan().entries:
        count = torch.Size(entry.shape).numel()
        values = torch.arange(count, dtype=torch.float32) + 1000 * len(made)
        made[entry.name] = values.reshape(entry.shape)
    made["lm_head.weight"] = made["model.embed_tokens.weight"]
    return made


def model_states(rank: int) -> dict[str, Any]:
    """What the file with the weights of a rank holds."""
    module: OrderedDict[str, torch.Tensor] = OrderedDict()
    for entry in plan().entries:
        full = full_weights()[entry.name]
        module[entry.name] = shard_of(full, entry=entry, rank=rank) if entry.is_sharded else full
    module["lm_head.weight"] = module["model.embed_tokens.weight"]
    names = [name for name in module if name != "lm_head.weight"]
    states = {
        index: {
            "step": torch.tensor(3.0),
            "exp_avg": torch.ones_like(module[name]),
            "exp_avg_sq": module[name].clone(),
        }
        for index, name in enumerate(names)
    }
    settings = {"lr": 0.1, "params": list(range(len(names)))}
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": {"state": states, "param_groups": [settings]},
        "param_shapes": None,
        "frozen_param_shapes": None,
        "shared_params": {"lm_head.weight": "model.embed_tokens.weight"},
        "frozen_param_fragments": None,
        "lr_scheduler": {"last_batch_iteration": 3},
        "skipped_steps": 0,
        "global_steps": 3,
        "global_samples": 12,
        "dp_world_size": 1,
        "mp_world_size": RANKS,
        "ds_config": {"train_batch_size": 4, "tensor_parallel": {"autotp_size": RANKS}},
        "ds_version": "0.19.8",
    }


def write_states(folder: Path) -> None:
    """The files of a checkpoint into ``folder``, with the configuration of no model."""
    names = [entry.name for entry in plan().entries if not entry.is_tied]
    write_metadata(folder, plan(), [names], configs={"config.json": "{}"})
    for rank in range(RANKS):
        torch.save(model_states(rank), folder / f"mp_rank_{rank:02d}_model_states.pt")


def metadata(folder: Path) -> Any:
    return json.loads((folder / NAME).read_text())
