# SPDX-License-Identifier: Apache-2.0
"""The gradient norm of a sharded model, for training loops without DeepSpeed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepspeed_autotp.state.sharded_model import find_nested_tensor_parallel


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients so that their Euclidean norm is at most ``max_norm``.

    Returns the norm before, in float32, or in float64 where a gradient is: that of the unsharded
    model, each weight counted once however many ranks hold it. Parameters added after the model
    was sharded count as replicated. All ranks of the TP group call it. An unsharded model is
    clipped as torch does.
    """
    state = find_nested_tensor_parallel(model)
    if state is None:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    state.check_identity(model)
    square = torch.zeros((), dtype=torch.float64, device=state.parameters[0].device)
    dtype = torch.float32
    gradients = []
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        gradients.append(parameter.grad)
        dtype = torch.promote_types(dtype, parameter.grad.dtype)
        square += state.local_grad_square(parameter.grad, entry=state.entry(parameter))
    norm = state.group.all_reduce(square).sqrt().to(dtype)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.device))
    return norm
