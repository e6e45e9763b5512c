# SPDX-License-Identifier: Apache-2.0
"""Process groups that somebody else made, and the models that somebody wrapped."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from deepspeed_autotp.interop.deepspeed.module import deepspeed_module


def init_distributed(*, port: int, required: bool | None) -> None:
    """What ``deepspeed.initialize`` does first, done before we agree over ranks."""
    module = deepspeed_module()
    try:
        module.init_distributed(
            dist_backend=module.get_accelerator().communication_backend_name(),
            distributed_port=port,
            dist_init_required=required,
        )
    except ModuleNotFoundError as error:
        # Without a launcher's environment variables DeepSpeed asks MPI, which nobody installed.
        if error.name != "mpi4py":
            raise
        raise ValueError(
            "initialize: no launcher started this process, so its rank is not known; start the "
            "script with torchrun --nproc-per-node=N or with deepspeed"
        ) from None


def engine_group(*, tp_size: int) -> dist.ProcessGroup:
    """The group that DeepSpeed's engine uses: ``tp_size`` consecutive ranks, made at first use."""
    groups = importlib.import_module("deepspeed.utils.groups")
    groups._init_tp_mesh_device(tensor_model_parallel_size=tp_size)
    handle: dist.ProcessGroup = groups.get_tensor_model_parallel_group()
    return handle


def engine_group_size() -> int | None:
    """Ranks of the group that DeepSpeed's engine uses, or None where it has not made one."""
    groups = importlib.import_module("deepspeed.utils.groups")
    made = groups._TENSOR_MODEL_PARALLEL_GROUP
    return None if made is None else dist.get_world_size(made)


def mpu_group(mpu: Any) -> dist.ProcessGroup | None:
    """The tensor-parallel group of a Megatron-like ``mpu``, or None when it has none."""
    for name in ("get_tensor_model_parallel_group", "get_model_parallel_group"):
        method = getattr(mpu, name, None)
        if callable(method):
            handle: dist.ProcessGroup = method()
            return handle
    return None


def unwrapped(engine_or_model: Any) -> Iterator[nn.Module]:
    """``engine_or_model`` and, inwards, what DeepSpeed, DDP or compile wrapped in it."""
    inner = engine_or_model
    while isinstance(inner, nn.Module):
        yield inner
        inner = inner._modules.get("_orig_mod") or getattr(inner, "module", None)


def backend_timeout(backend: Any) -> timedelta | None:
    """How long a collective of a backend may take, where that says."""
    limit = getattr(getattr(backend, "options", None), "_timeout", None)
    return limit if isinstance(limit, timedelta) else None


def mesh_group(mesh: Any) -> dist.ProcessGroup:
    """The group of a one-dimensional DeviceMesh, or of its dimension "tp"."""
    if not isinstance(mesh, DeviceMesh):
        raise ValueError(f"parallelize: mesh: got {type(mesh).__name__}, expected a DeviceMesh")
    names = mesh.mesh_dim_names or ()
    if mesh.ndim > 1 and "tp" not in names:
        raise ValueError(
            f"parallelize: the mesh has the dimensions {list(names) or mesh.ndim}; name the one "
            'over which the model is cut "tp", or pass mesh["that dimension"]'
        )
    handle: dist.ProcessGroup = mesh.get_group("tp" if "tp" in names else 0)
    return handle
