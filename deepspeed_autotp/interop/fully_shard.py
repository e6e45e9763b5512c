# SPDX-License-Identifier: Apache-2.0
"""torch's ``fully_shard`` (FSDP2): its modules, and the DTensors it makes of parameters.

Their modules take long to import. Where they are not imported, there are no objects of theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed_autotp.interop.torch_private import checkpoint_chunks, fully_shard_meshes

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def _is(value: object, module: str, name: str) -> bool:
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)


def _is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    return _is(tensor, "torch.distributed.tensor", "DTensor")


def is_distributed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, as fully_shard makes of parameters."""
    return _is_dtensor(tensor)


def is_fully_sharded(module: object) -> bool:
    """Whether fully_shard was called for ``module`` itself."""
    return _is(module, "torch.distributed.fsdp", "FSDPModule")


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``, in its own memory; of a plain tensor all of it."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def local_window(tensor: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """Offsets and sizes of the local part within ``tensor``."""
    if not _is_dtensor(tensor):
        return [0] * tensor.dim(), tensor.shape
    (chunk,) = checkpoint_chunks(tensor)
    return chunk.offsets, chunk.sizes


def gathered(tensor: Tensor) -> Tensor:
    """All of a DTensor, on every rank of its mesh, which call it together; else the tensor."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def fully_sharded_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that fully_shard was called for, with their names in ``model``."""
    return [(name, each) for name, each in model.named_modules() if is_fully_sharded(each)]


def stays_gathered(module: nn.Module, model: nn.Module) -> bool:
    """Whether parameters of ``module``, once it runs, are plain tensors until the forward of
    ``model`` around it ends: fully_shard was called for neither it nor a module between them."""
    inside = [each for _, each in fully_sharded_modules(model) if each is not model]
    return not any(module is each for outer in inside for each in outer.modules())


def reshard(model: nn.Module) -> None:
    """Let all that fully_shard keeps in parts be DTensors: after a forward a root's are not."""
    for _, module in fully_sharded_modules(model):
        cast("FSDPModule", module).reshard()


def mesh_ranks(module: nn.Module) -> set[int]:
    """The global ranks that fully_shard spreads the parameters of ``module`` over, this among
    them."""
    ranks = {dist.get_rank()}
    for mesh in fully_shard_meshes(module):
        for dim in range(mesh.ndim):
            ranks.update(dist.get_process_group_ranks(mesh.get_group(dim)))
    return ranks


def over_parts(value: Tensor, tensor: Tensor, *, largest: bool) -> Tensor:
    """``value`` of this rank's part of a DTensor, summed over its parts or the largest of them, as
    a new tensor; of another tensor ``value`` itself."""
    if not _is_dtensor(tensor):
        return value
    total = value.clone()
    for dim, placement in enumerate(tensor.placements):
        if not placement.is_shard():
            continue
        group = tensor.device_mesh.get_group(dim)
        if largest:  # a maximum of gloo may lose what is no number
            found = [torch.empty_like(total) for _ in range(dist.get_world_size(group))]
            dist.all_gather(found, total, group=group)
            total = torch.stack(found).amax()
        else:
            dist.all_reduce(total, group=group)
    return total


def same_parts(tensor: Tensor) -> object:
    """What is equal for DTensors that have their parts on the same ranks; None of others."""
    if not _is_dtensor(tensor):
        return None
    return tensor.device_mesh, tuple(placement.is_shard() for placement in tensor.placements)
