# SPDX-License-Identifier: Apache-2.0
"""Collectives for torch.compile: torch's functional ones, each of which gives a new tensor."""

from __future__ import annotations

import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor


def traced_all_reduce(x: Tensor, handle: dist.ProcessGroup) -> Tensor:
    """The sum of contiguous ``x`` over the ranks."""
    summed: Tensor = functional.all_reduce(x, "sum", handle)
    return summed


def traced_all_gather(x: Tensor, handle: dist.ProcessGroup) -> Tensor:
    """The ranks' contiguous ``x`` along dimension 0."""
    gathered: Tensor = functional.all_gather_tensor(x, 0, handle)
    return gathered


def traced_reduce_scatter(x: Tensor, handle: dist.ProcessGroup) -> Tensor:
    """This rank's rows of the sum of contiguous ``x`` over the ranks."""
    rows: Tensor = functional.reduce_scatter_tensor(x, "sum", 0, handle)
    return rows
