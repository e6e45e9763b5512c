# SPDX-License-Identifier: Apache-2.0
"""Dropout under DeepSpeed's activation checkpointing."""

import torch
from torch import Tensor

from tests.support.dropout_model import build_dropout_model, inputs, masks_of, shard


def checkpointed(heads: int) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]], list[float]]:
    """Gradients without and with checkpoints, masks with, and random numbers behind each."""
    import deepspeed

    deepspeed.init_distributed()
    deepspeed.checkpointing.configure(None)
    model = build_dropout_model(heads)
    shard(model, heads)
    grads, behind = [], []
    for checkpoint in (None, deepspeed.checkpointing.checkpoint):
        model.checkpoint = checkpoint
        masks_of(model)  # those of before
        model.zero_grad()
        torch.manual_seed(5)
        model(inputs(heads)).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        behind.append(float(torch.rand(())))
    masks = [dropout.seen for name, dropout in model.dropouts() if name.startswith("blocks")]
    return grads[0], grads[1], masks, behind
