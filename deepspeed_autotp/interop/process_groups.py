# SPDX-License-Identifier: Apache-2.0
"""Process groups of others: of a Megatron-like mpu, of a DeviceMesh."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def mpu_group(mpu: Any) -> dist.ProcessGroup | None:
    """The tensor-parallel group of a Megatron-like ``mpu``, or None when it has none."""
    for name in ("get_tensor_model_parallel_group", "get_model_parallel_group"):
        method = getattr(mpu, name, None)
        if callable(method):
            handle: dist.ProcessGroup = method()
            return handle
    return None


def mesh_group(mesh: Any, called: str) -> dist.ProcessGroup:
    """The group of a one-dimensional DeviceMesh, or of its dimension "tp"; ``called`` is the
    function that was given it."""
    if not isinstance(mesh, DeviceMesh):
        raise ValueError(f"{called}: mesh: got {type(mesh).__name__}, expected a DeviceMesh")
    names = mesh.mesh_dim_names or ()
    if mesh.ndim > 1 and "tp" not in names:
        raise ValueError(
            f"{called}: mesh: got the dimensions {list(names) or mesh.ndim}, expected one "
            'dimension or one named "tp"; name the TP dimension "tp", or pass mesh["its name"]'
        )
    handle: dist.ProcessGroup = mesh.get_group("tp" if "tp" in names else 0)
    return handle
