# SPDX-License-Identifier: Apache-2.0
"""Models that cannot be sharded, whatever the configuration."""

from __future__ import annotations

import torch
from torch import nn

from deepspeed_autotp.interop.deepspeed.parameters import is_shard_of_others
from deepspeed_autotp.interop.fully_shard import fully_sharded_modules, is_distributed
from deepspeed_autotp.interop.module_state import find_state
from deepspeed_autotp.interop.quantizers import refuse_quantizer
from deepspeed_autotp.interop.torch_private import has_gradient_hooks
from deepspeed_autotp.interop.wrappers import refuse_wrapped
from deepspeed_autotp.layers.layer_sharding import LayerSharding
from deepspeed_autotp.sharding.weight_location import refuse_partly_there
from deepspeed_autotp.state.sharded_model import find_tensor_parallel


def refuse_unshardable(model: nn.Module) -> None:
    """ValueError for a model whose weights are not there, are sharded or on several devices."""
    what = type(model).__name__
    refuse_wrapped(model)
    if any(find_tensor_parallel(module) is not None for module in model.modules()):
        raise ValueError(f"{what} is sharded already; shard a model once")
    for name, module in model.named_modules():
        if find_state(module, LayerSharding) is not None:
            raise ValueError(
                f"{name or what} is a sharded layer, as after an interrupt of parallelize or "
                "initialize, or in a part of another sharded model: its weights may be shards; "
                "build or load the model again"
            )
    refuse_quantizer(model)
    places: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_distributed(tensor) and fully_sharded_modules(model):
            raise ValueError(
                f"{name} is a DTensor: fully_shard was called already, and a rank has some rows of "
                "the full weight; call parallelize first, then fully_shard over data-parallel ranks"
            )
        if is_distributed(tensor):  # as behind transformers' tp_plan="auto"
            raise ValueError(
                f"{name} is a DTensor, which is sharded already; load the model without a "
                "tp_plan or device mesh"
            )
        if not isinstance(tensor, nn.Parameter):
            continue
        if is_shard_of_others(tensor):
            raise ValueError(
                f"{name} is marked as a shard already, as by a LinearLayer of DeepSpeed; shard the "
                "model without such layers, or leave all of it to them: initialize with "
                "layer_specs of partition_type 'skip' for everything"
            )
        if has_gradient_hooks(tensor):
            raise ValueError(
                f"{name} has a gradient hook, which would be given a part of the gradient: that of "
                "a shard, or before it is summed over the ranks; register it after the model is "
                "sharded, where it is given the gradient of this rank's shard"
            )
        places.setdefault(tensor.device, name)
        if tensor.grad is not None:
            raise ValueError(
                f"{name} has a gradient of the unsharded weight; call model.zero_grad() before"
            )
    refuse_partly_there(model)
    if not places:
        raise ValueError(f"{what} has no parameters: there is nothing to shard")
    if len(places) > 1:
        named = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise ValueError(f"the weights are on several devices ({named}); move the model to one")
