# SPDX-License-Identifier: Apache-2.0
"""How the tensors of a model are made that a loader has left without values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepspeed_autotp.loading.traced_tensor import Origin, TracedTensor


@dataclass(frozen=True, slots=True)
class FileWeights:
    """Of each tensor of a model, by its id: its ``origins`` in a checkpoint, or, where that does
    not have it, the full value that transformers gave it. ``tensors`` keeps the ids valid."""

    origins: dict[int, Origin]
    values: dict[int, Tensor]
    tensors: tuple[Tensor, ...]

    def origin(self, tensor: Tensor) -> Origin | None:
        """None where its value is in ``values``, or where it is in the model."""
        return self.origins.get(id(tensor))


def separate_weights(model: nn.Module) -> FileWeights:
    """Leave all parameters of ``model`` on the meta device, and say how each is made.

    Buffers of the checkpoint, too; others keep their values.
    """
    weights = FileWeights({}, {}, ())
    made: dict[int, Tensor] = {}
    before: list[Tensor] = []
    for module in model.modules():
        own = [
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for leaf, tensor in own:
            if not isinstance(tensor, (nn.Parameter, TracedTensor)):
                continue
            if id(tensor) not in made:
                before.append(tensor)  # or its id would be given again
                made[id(tensor)] = _without_value(tensor, weights)
            setattr(module, leaf, made[id(tensor)])
    return FileWeights(weights.origins, weights.values, tuple(made.values()))


def _without_value(tensor: Tensor, weights: FileWeights) -> Tensor:
    empty: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    if isinstance(tensor, TracedTensor):
        weights.origins[id(empty)] = tensor.origin
    elif tensor.is_meta:
        raise ValueError(
            f"a tensor of shape {list(tensor.shape)} has no values after loading; load the model "
            "on every rank and shard it then"
        )
    else:
        weights.values[id(empty)] = tensor.detach()
    return empty
