# SPDX-License-Identifier: Apache-2.0
"""Memory for tensors on the meta device, which stay the objects that they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def give_memory(
    name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device
) -> Callable[[], None]:
    """Let ``tensor`` have memory for ``shape`` on ``device``; the function returned undoes it.

    A tensor on the meta device takes no ``.data`` from another one. ValueError where it cannot be.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"{name} is a {type(tensor).__name__} on the meta device, expected a plain "
            "parameter or buffer; load the model on every rank"
        )
    held: Tensor = torch.empty(shape, dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        held = nn.Parameter(held, requires_grad=tensor.requires_grad)
    vars(held).update(vars(tensor))
    try:
        torch.utils.swap_tensors(tensor, held)
    except RuntimeError as error:
        raise ValueError(
            f"{name} is on the meta device, and no memory can be allocated for it, since "
            f"something else refers to it ({error}); shard the model first"
        ) from None
    return lambda: torch.utils.swap_tensors(tensor, held)
