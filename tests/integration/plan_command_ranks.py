# SPDX-License-Identifier: Apache-2.0
"""Run on every rank by tests.integration.test_plan_command."""

import torch
import torch.distributed as dist

import deepspeed_autotp
from deepspeed_autotp.interop.named_model import named_model


def rank_bytes(text: str) -> int:
    """What the parameters of the model take on this rank once it is sharded."""
    config = named_model(text, dtype=torch.bfloat16).config
    model = type(named_model(text))(config).to(torch.bfloat16)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    return sum(p.numel() * p.itemsize for p in model.parameters())
