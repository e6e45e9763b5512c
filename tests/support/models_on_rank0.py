# SPDX-License-Identifier: Apache-2.0
"""Models whose weights are on TP rank 0 alone, the others on the meta device."""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp


def weights_on_rank0(tp: int) -> Any:
    """Within it, a model is built on the meta device, but for TP rank 0 of ``tp`` ranks."""
    return torch.device("meta") if dist.get_rank() % tp else contextlib.nullcontext()


def same_weights(model: nn.Module, unsharded: nn.Module) -> bool:
    full = deepspeed_autotp.full_state_dict(model)
    state = unsharded.state_dict()
    return full.keys() == state.keys() and all(torch.equal(full[n], t) for n, t in state.items())
