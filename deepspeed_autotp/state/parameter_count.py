# SPDX-License-Identifier: Apache-2.0
"""How many parameters a sharded model has, over all ranks."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import nn

from deepspeed_autotp.interop.deepspeed.auto_ep import expert_group, is_expert
from deepspeed_autotp.interop.deepspeed.parameters import full_shape
from deepspeed_autotp.interop.module_state import replace_method
from deepspeed_autotp.state.fully_shard import follow_fully_shard
from deepspeed_autotp.state.sharded_model import container_of, owner_of


def count_full_parameters(model: nn.Module) -> None:
    """Let ``num_parameters`` of transformers models in ``model`` count full parameters, of which a
    Trainer computes its floating-point operations."""
    for module in model.modules():
        replace_method(module, "num_parameters", num_parameters)


def num_parameters(
    model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """As ``PreTrainedModel.num_parameters`` of the model before it was sharded."""
    state = container_of(model.parameters())
    if state is not None and state.root is not None:
        follow_fully_shard(state.root, state)
    left_out = {
        id(module.weight)
        for module in model.modules()
        if exclude_embeddings and isinstance(module, nn.Embedding)
    }
    count = 0
    for parameter in model.parameters():
        if id(parameter) not in left_out and (parameter.requires_grad or not only_trainable):
            owner = owner_of(parameter)
            entry = None if owner is None else owner.entry(parameter)
            split = dist.get_world_size(expert_group(parameter)) if is_expert(parameter) else 1
            count += split * math.prod(full_shape(parameter) if entry is None else entry.shape)
    return count
