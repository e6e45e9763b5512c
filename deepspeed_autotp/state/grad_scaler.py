# SPDX-License-Identifier: Apache-2.0
"""Loss scaling of a sharded model in float16, in a training loop without DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deepspeed_autotp.interop.torch_private import found_inf_per_device
from deepspeed_autotp.state.sharded_model import TensorParallel, find_nested_tensor_parallel


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` for a model that is sharded: its ranks skip a step together.

    torch's own sees the gradients of one rank's shards. Where one of them is infinite, that rank
    alone would skip the step and lower its scale, and the ranks would drift apart for good.

        model = deepspeed_autotp.parallelize(model, tp_size=4)
        scaler = deepspeed_autotp.GradScaler("cuda", model=model)

    and then as torch documents it. ``model`` may also be a wrapper of the sharded model, or be
    unsharded. All ranks of the TP group call ``unscale_`` or ``step``, which add one all-reduce of
    a number. Gradients of the data-parallel replicas are averaged before, as by DDP.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        model: nn.Module,
    ) -> None:
        super().__init__(
            device, init_scale, growth_factor, backoff_factor, growth_interval, enabled
        )
        self._state = find_nested_tensor_parallel(model)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """As torch's, with infinite and NaN gradients of any rank found on all ranks."""
        super().unscale_(optimizer)
        if self._state is not None and self.is_enabled():
            self._find_on_all(optimizer, self._state)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As torch's; the step is skipped on all ranks or on none."""
        # A fused optimizer unscales in its kernel, and looks at the gradients of this rank alone.
        is_sharded = self._state is not None and self.is_enabled()
        if is_sharded and not found_inf_per_device(self, optimizer):
            self.unscale_(optimizer)
        return super().step(optimizer, *args, **kwargs)

    def _find_on_all(self, optimizer: torch.optim.Optimizer, state: TensorParallel) -> None:
        found = found_inf_per_device(self, optimizer)
        total = torch.zeros((), dtype=torch.float32, device=state.device)
        for own in found.values():
            total += own.to(total.device)
        total = state.group.all_reduce(total).clamp(max=1.0)
        for own in found.values():
            own.copy_(total)
        if not found:  # none of this rank's parameters has a gradient
            found[total.device] = total
