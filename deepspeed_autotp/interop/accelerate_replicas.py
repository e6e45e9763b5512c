# SPDX-License-Identifier: Apache-2.0
"""Accelerate under tensor parallelism: it sees data-parallel replicas where it would see ranks.

The ranks of a TP group work on the same rows. Accelerate gathers, reduces, counts, shards data and
seeds by rank, so that it would have each row once for every TP rank; with a replica for a rank it
does what it does without tensor parallelism. Which process is the main one stays as it is.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp.interop.deepspeed.groups import data_parallel_group
from deepspeed_autotp.interop.replaced import Replaced
from deepspeed_autotp.interop.versions import required

_required = functools.partial(required, project="accelerate", needed_for="install()")

_sees_ranks: ContextVar[bool] = ContextVar("autotp_sees_ranks", default=False)


def configured_tp_size(config: Any) -> int:
    """The TP size that a DeepSpeed configuration asks for; 1 without, and where ranks are seen."""
    section = config.get("tensor_parallel") if isinstance(config, dict) else None
    size = section.get("autotp_size") if isinstance(section, dict) else None
    return size if type(size) is int and size > 1 and not _sees_ranks.get() else 1


def tp_size() -> int:
    """The TP size of the DeepSpeed configuration that Accelerate uses; 1 without."""
    states = importlib.import_module("accelerate.state").AcceleratorState
    if not _required(states, "_shared_state"):
        return 1
    return configured_tp_size(getattr(states().deepspeed_plugin, "deepspeed_config", None))


class Replicas:
    """Accelerate's state, with data-parallel replicas in the place of processes."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def __getattr__(self, name: str) -> Any:
        if name == "_state":  # of one that is being copied
            raise AttributeError(name)
        return getattr(self._state, name)

    @property
    def num_processes(self) -> int:
        return max(1, int(self._state.num_processes) // tp_size())

    @property
    def process_index(self) -> int:
        return int(self._state.process_index) // tp_size()


class _OneReader(Replicas):
    """Replicas, of which rank 0 alone is process 0."""

    @property
    def process_index(self) -> int:
        return int(self._state.process_index)


class _OfRank:
    """An Accelerator whose process is a rank."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    @property
    def process_index(self) -> int:
        return int(self._accelerator.state.process_index)


@contextmanager
def seeing_ranks() -> Iterator[None]:
    """Let everything count ranks in this context, as without :func:`see_replicas`."""
    token = _sees_ranks.set(True)
    try:
        yield
    finally:
        _sees_ranks.reset(token)


def with_flag(flag: ContextVar[bool], method: Callable[..., Any]) -> Callable[..., Any]:
    """``method``, whose calls have ``flag`` set."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        token = flag.set(True)
        try:
            return method(*args, **kwargs)
        finally:
            flag.reset(token)

    return call


def of_ranks(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method``, whose calls see ranks."""
    return with_flag(_sees_ranks, method)


def see_replicas(replaced: Replaced) -> None:
    """Let Accelerate see replicas wherever its DeepSpeed configuration has a TP size."""
    operations = importlib.import_module("accelerate.utils.operations")
    for name, ours in (("_gpu_gather", _gather), ("_gpu_gather_object", _gather_object)):
        original = _required(operations, name)
        replaced.put(operations, name, functools.partial(ours, original))
    reduce = functools.partial(_reduce, operations.reduce)
    # Not in the module of operations, which sums what one rank alone has.
    for module in ("accelerate.accelerator", "accelerate.utils", "accelerate"):
        if "reduce" in vars(importlib.import_module(module)):
            replaced.put(importlib.import_module(module), "reduce", reduce)
    states = importlib.import_module("accelerate.state")
    for module in ("accelerate.scheduler", "accelerate.utils.random"):
        replaced.put(
            importlib.import_module(module),
            "AcceleratorState",
            lambda: Replicas(states.AcceleratorState()),
        )
    split = states.PartialState.split_between_processes
    replaced.put(
        states.PartialState,
        "split_between_processes",
        functools.wraps(split)(lambda self, *a, **k: split(Replicas(self), *a, **k)),
    )
    _see_replicas_in_accelerator(replaced)
    _see_replicas_in_dispatcher(replaced)


def _see_replicas_in_accelerator(replaced: Replaced) -> None:
    cls = importlib.import_module("accelerate").Accelerator
    make = cls.__init__
    replaced.put(
        cls,
        "__init__",
        functools.wraps(make)(lambda self, *a, **k: _make(self, make, *a, **k)),
    )
    for name in ("num_processes", "process_index"):
        replaced.put(cls, name, property(functools.partial(_replica_number, name)))
    mesh = _required(cls, "_prepare_device_mesh")
    # By which Accelerate would shard the data over the replicas once more.
    replaced.put(cls, "_prepare_device_mesh", lambda self: mesh(self) if tp_size() == 1 else None)
    replaced.put(cls, "check_trigger", of_ranks(cls.check_trigger))
    profile = cls.profile  # a file for each process
    replaced.put(
        cls,
        "profile",
        functools.wraps(profile)(lambda self, *a, **k: profile(_OfRank(self), *a, **k)),
    )
    last = cls.is_last_process.fget
    replaced.put(cls, "is_last_process", property(of_ranks(last)))


def _make(accelerator: Any, make: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """ValueError for an Accelerator that leaves out the DeepSpeed plugin that it is given."""
    make(accelerator, *args, **kwargs)
    given = inspect.signature(make).bind(accelerator, *args, **kwargs).arguments
    plugins = given.get("deepspeed_plugins") or given.get("deepspeed_plugin")
    for plugin in plugins.values() if isinstance(plugins, dict) else [plugins]:
        size = configured_tp_size(getattr(plugin, "deepspeed_config", None))
        kind = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
        if size > 1 and kind != "DEEPSPEED":
            raise ValueError(
                f"Accelerator: got tensor_parallel.autotp_size {size} in its DeepSpeed plugin and "
                f"distributed_type {kind}, expected DEEPSPEED: Accelerate uses no plugin with "
                "cpu=True or ACCELERATE_USE_CPU, and no model would be sharded. On CPUs call "
                "accelerate.PartialState(cpu=True) before, and leave cpu=True out; elsewhere start "
                "the script with torchrun or accelerate launch"
            )


def _replica_number(name: str, accelerator: Any) -> int:
    number: int = getattr(Replicas(accelerator.state), name)
    return number


def _see_replicas_in_dispatcher(replaced: Replaced) -> None:
    """The loader whose first process reads for all: its batch is sharded over the replicas."""
    module = importlib.import_module("accelerate.data_loader")
    states = importlib.import_module("accelerate.state")
    replaced.put(module, "PartialState", lambda: Replicas(states.PartialState()))
    cls = module.DataLoaderDispatcher
    original = cls.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.state = _OneReader(states.PartialState())
        self.slice_fn = functools.partial(_rows_of_replica, self.slice_fn)

    replaced.put(cls, "__init__", init)


def _rows_of_replica(
    pick: Callable[..., Any], data: Any, rows: slice, process_index: int, num_processes: int
) -> Any:
    """What ``pick`` gives the replica of a rank, where ``rows`` are those by rank; others, which
    fill up the last batch, are the same on all."""
    count = rows.stop - rows.start
    if rows.start == process_index * count:
        process_index //= tp_size()
        rows = slice(process_index * count, (process_index + 1) * count)
    return pick(data, rows, process_index=process_index, num_processes=num_processes)


def _gather(original: Callable[..., Any], tensor: Any) -> Any:
    if (size := tp_size()) == 1:
        return original(tensor)
    each = functools.partial(_gathered, group=data_parallel_group(tp_size=size))
    return _recursively(each, tensor)


def _gathered(tensor: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    mine = tensor.reshape(1) if tensor.dim() == 0 else tensor.contiguous()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return torch.cat(parts)


def _gather_object(original: Callable[..., Any], value: Any) -> Any:
    if (size := tp_size()) == 1:
        return original(value)
    group = data_parallel_group(tp_size=size)
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, value, group=group)
    return [each for part in parts for each in part]


def _reduce(
    original: Callable[..., Any], tensor: Any, reduction: str = "mean", scale: float = 1.0
) -> Any:
    if (size := tp_size()) == 1:
        return original(tensor, reduction, scale)
    group = data_parallel_group(tp_size=size)
    operation = dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM

    def each(mine: Tensor) -> Tensor:
        reduced = mine.clone()
        dist.all_reduce(reduced, operation, group=group)
        if reduction == "mean":
            reduced /= dist.get_world_size(group)
        return reduced

    return _recursively(each, tensor)


def _recursively(each: Callable[[Tensor], Tensor], tensors: Any) -> Any:
    operations = importlib.import_module("accelerate.utils.operations")
    return operations.recursively_apply(each, tensors, error_on_other_type=True)
