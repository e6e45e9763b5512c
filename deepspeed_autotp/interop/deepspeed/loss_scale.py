# SPDX-License-Identifier: Apache-2.0
"""Loss scaling of DeepSpeed's engine in float16, where DeepSpeed does it wrongly or on one rank.

With ``fp16`` and ZeRO 1 to 3 DeepSpeed itself agrees on infinite gradients over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deepspeed_autotp.interop.deepspeed.module import deepspeed_module, versions


def refuse_wrong_loss_scale(checked: Any) -> None:
    """ValueError where DeepSpeed 0.19.8 divides gradients by a loss scale that the loss was not
    multiplied with, or clips them before they are divided by it; ``checked`` is a DeepSpeedConfig.
    """
    stage = checked.zero_optimization_stage
    if checked.float16_config.enabled and stage == 0:
        raise ValueError(
            "initialize: fp16.enabled: got true with ZeRO stage 0, expected ZeRO: there DeepSpeed "
            f"({versions()}) divides the gradients by a loss scale that the loss was not "
            "multiplied with; set zero_optimization.stage to 1, 2 or 3, or use bf16"
        )
    if checked.torch_autocast_enabled and checked.torch_autocast_dtype is torch.float16 and stage:
        raise ValueError(
            f"initialize: torch_autocast.dtype: got float16 with ZeRO stage {stage}: there each "
            f"rank of DeepSpeed ({versions()}) has a loss scale of its own, and gradients "
            "are clipped before they are divided by it; use bfloat16, fp16.enabled, or ZeRO stage 0"
        )


def refuse_own_scale(engine: Any) -> None:
    """ValueError where each rank would skip steps by the gradients of its own shards."""
    if getattr(engine, "torch_autocast_z0_gradscaler", None) is not None:
        raise ValueError(
            "initialize: torch_autocast.dtype: got float16 with layers that are parallel by "
            "themselves, expected bfloat16: each rank would skip steps by its own gradients"
        )


def scale_on_all_ranks(engine: Any, *, scaler: Callable[[str], torch.amp.GradScaler]) -> None:
    """Replace the scaler of torch's autocast, whose skipped steps are those of one rank."""
    if getattr(engine, "torch_autocast_z0_gradscaler", None) is not None:
        device = deepspeed_module().get_accelerator().device_name()
        engine.torch_autocast_z0_gradscaler = scaler(device)
