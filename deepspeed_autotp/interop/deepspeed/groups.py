# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's process groups: torch.distributed as it initializes it, and its TP group."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from deepspeed_autotp.interop.deepspeed.module import deepspeed_module
from deepspeed_autotp.interop.torch_private import registered_groups, take_timeout
from deepspeed_autotp.interop.versions import required

_required = functools.partial(required, project="deepspeed", needed_for="initialize")


def init_distributed(*, port: int, required: bool | None) -> None:
    """What ``deepspeed.initialize`` does first; done earlier, to compare the ranks."""
    module = deepspeed_module()
    try:
        module.init_distributed(
            dist_backend=module.get_accelerator().communication_backend_name(),
            distributed_port=port,
            dist_init_required=required,
        )
    except ModuleNotFoundError as error:
        # Without a launcher's environment variables DeepSpeed uses MPI, which is not installed.
        if error.name != "mpi4py":
            raise
        raise ValueError(
            "initialize: no launcher started this process, so its rank is not known; start the "
            "script with torchrun --nproc-per-node=N or with deepspeed"
        ) from None


@contextmanager
def timeout_of_default_group() -> Iterator[None]:
    """A context in which process groups that are made get the timeout of the default one. DeepSpeed
    makes its groups with torch's, of 30 minutes over gloo, whatever the run was given."""
    world, before = dist.group.WORLD, set(registered_groups())
    assert world is not None
    yield
    for handle in registered_groups():
        if handle not in before:
            take_timeout(handle, world)


def engine_group(*, tp_size: int) -> dist.ProcessGroup:
    """The TP group of DeepSpeed's engine: ``tp_size`` consecutive ranks, created at first use."""
    groups = importlib.import_module("deepspeed.utils.groups")
    make = _required(groups, "_init_tp_mesh_device")
    with timeout_of_default_group():
        make(tensor_model_parallel_size=tp_size)
    handle: dist.ProcessGroup = groups.get_tensor_model_parallel_group()
    return handle


def engine_group_size() -> int | None:
    """The size of the TP group of DeepSpeed's engine, or None where it has not created one."""
    groups = importlib.import_module("deepspeed.utils.groups")
    made = _required(groups, "_TENSOR_MODEL_PARALLEL_GROUP")
    return None if made is None else dist.get_world_size(made)


def data_parallel_group(*, tp_size: int) -> dist.ProcessGroup:
    """The ranks that hold this rank's shards, one of each replica, created at first use."""
    init_distributed(port=29500, required=None)
    engine_group(tp_size=tp_size)
    groups = importlib.import_module("deepspeed.utils.groups")
    handle: dist.ProcessGroup = _required(groups, "_DATA_PARALLEL_GROUP")
    return handle
