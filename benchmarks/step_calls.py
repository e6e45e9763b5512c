# SPDX-License-Identifier: Apache-2.0
"""Counts the collectives of a rank, and takes them away.

Both work below the functions of torch.distributed: what a DTensor, a functional collective or
DeepSpeed's wrapper starts is counted and taken away like any other call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, OTHER = KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "other",
)
GLOO, SHARED_MEMORY = "gloo", "shared memory"
_CPU = torch.device("cpu")

# What starts a collective: the kind, and which argument is sent.
_OPERATIONS: Mapping[str, tuple[str, int]] = {
    "c10d.allreduce_": (ALL_REDUCE, 0),
    "c10d.allreduce_coalesced_": (ALL_REDUCE, 0),
    "c10d.allgather_": (ALL_GATHER, 1),
    "c10d._allgather_base_": (ALL_GATHER, 1),
    "c10d.allgather_coalesced_": (ALL_GATHER, 1),
    "c10d.allgather_into_tensor_coalesced_": (ALL_GATHER, 1),
    "c10d.reduce_scatter_": (REDUCE_SCATTER, 1),
    "c10d._reduce_scatter_base_": (REDUCE_SCATTER, 1),
    "c10d.reduce_scatter_tensor_coalesced_": (REDUCE_SCATTER, 1),
    "c10d.broadcast_": (OTHER, 0),
    "c10d.reduce_": (OTHER, 0),
    "c10d.alltoall_": (OTHER, 1),
    "c10d.alltoall_base_": (OTHER, 1),
    "c10d.barrier": (OTHER, 0),
    "_c10d_functional.all_reduce": (ALL_REDUCE, 0),
    "_c10d_functional.all_reduce_": (ALL_REDUCE, 0),
    "_c10d_functional.all_reduce_coalesced": (ALL_REDUCE, 0),
    "_c10d_functional.all_gather_into_tensor": (ALL_GATHER, 0),
    "_c10d_functional.all_gather_into_tensor_coalesced": (ALL_GATHER, 0),
    "_c10d_functional.reduce_scatter_tensor": (REDUCE_SCATTER, 0),
    "_c10d_functional.reduce_scatter_tensor_coalesced": (REDUCE_SCATTER, 0),
    "_c10d_functional.all_to_all_single": (OTHER, 0),
    "deepspeed.inference_all_reduce_": (ALL_REDUCE, 0),
    "deepspeed.inference_all_reduce": (ALL_REDUCE, 0),
    "deepspeed_autotp.shm_take_sum": (ALL_REDUCE, 1),
    "deepspeed_autotp.shm_gather": (ALL_GATHER, 1),
}
_SPACES = ("c10d", "_c10d_functional", "deepspeed")
_IN_MEMORY = ("deepspeed.", "deepspeed_autotp.shm_")
_WAITS = ("_c10d_functional.wait_tensor", "_c10d_functional._wrap_tensor_autograd")


@dataclass(frozen=True, slots=True)
class Call:
    """One collective. ``size`` is the bytes that this rank gives to it: the full tensor of an
    all-reduce or a reduce-scatter, the own shard of an all-gather."""

    kind: str
    size: int
    ranks: int
    transport: str


class Recorder(TorchDispatchMode):
    """Collects the collectives that start within it, those of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # By name: the other ways are measured without the package in the process.
        if any(issubclass(kind, DTensor) or kind.__name__ == "GatheredWeight" for kind in types):
            return NotImplemented  # comes again, as operations on what these stand for
        name = str(func.overloadpacket)
        if name in _OPERATIONS or (func.namespace in _SPACES and name not in _WAITS):
            self.calls.append(_call(name, args))
        return func(*args, **(kwargs or {}))


def _call(name: str, args: tuple[Any, ...]) -> Call:
    if name not in _OPERATIONS:
        raise ValueError(
            f"{name} is not known to this benchmark: say in _OPERATIONS what kind of collective "
            "it is and which argument it sends"
        )
    kind, sent = _OPERATIONS[name]
    if name.startswith(_IN_MEMORY):
        if name.endswith("take_sum") and args[2].shape != args[sent].shape:
            kind = REDUCE_SCATTER
        return Call(kind, _size(args[sent]), dist.get_world_size(), SHARED_MEMORY)
    return Call(kind, _size(args[sent]), _ranks(args), GLOO)


def _size(sent: Any) -> int:
    """Bytes of a tensor or of tensors in lists."""
    return sent.nbytes if isinstance(sent, Tensor) else sum(map(_size, sent))


def _ranks(args: tuple[Any, ...]) -> int:
    """Ranks of the group that an operation is given: as an object, or by name as last argument."""
    for value in args:
        if isinstance(value, torch.ScriptObject):
            with_group: dist.ProcessGroup = dist.ProcessGroup.unbox(value)
            return with_group.size()
    named: dist.ProcessGroup = distributed_c10d._resolve_process_group(args[-1])
    return named.size()


@contextmanager
def removed() -> Iterator[None]:
    """Within it the collectives of every group do nothing and take no time.

    The group gets torch's fake backend, which returns finished work. An all-reduce then leaves
    the tensor as it is; an all-gather still fills its output, with this rank's own shard. What goes
    through the memory that ranks share goes to the group instead.
    """
    groups = list(distributed_c10d._world.pg_map)
    backends = [group._get_backend(_CPU) for group in groups]
    types = dist.ProcessGroup.BackendType
    for group in groups:
        fake = FakeProcessGroup._create_internal(group.rank(), group.size())
        # A group that has met a type keeps its first backend of it, so a second visit is free.
        group._register_backend(_CPU, types.CUSTOM, fake)
    try:
        with _without_shared_memory():
            yield
    finally:
        for group, backend in zip(groups, backends, strict=True):
            group._register_backend(_CPU, types.GLOO, backend)


def _without_shared_memory() -> AbstractContextManager[object]:
    """Within it there is no memory that the ranks share; DeepSpeed and others have none."""
    module = sys.modules.get("deepspeed_autotp.distributed.shared_memory")
    if module is None:
        return nullcontext()
    return mock.patch.object(module.SharedMemory, "can_gather", lambda memory, x: False)
