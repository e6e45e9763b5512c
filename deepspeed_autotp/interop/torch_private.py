# SPDX-License-Identifier: Apache-2.0
"""Underscored names of torch, one function each, checked at first use."""

from __future__ import annotations

import torch
from torch import Tensor

TESTED = "2.13.0"


def _missing(name: str) -> RuntimeError:
    return RuntimeError(
        f"tested with torch {TESTED}, found {torch.__version__}; this needs {name}, which is not "
        f"there; install torch=={TESTED}"
    )


def found_inf_per_device(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer
) -> dict[torch.device, Tensor]:
    """What ``unscale_`` found in the gradients of ``optimizer``: on each device a number that is
    not 0 where one is not finite. Empty before ``unscale_``; what is written to it counts."""
    method = getattr(scaler, "_found_inf_per_device", None)
    if method is None:
        raise _missing("torch.amp.GradScaler._found_inf_per_device")
    found: dict[torch.device, Tensor] = method(optimizer)
    return found
