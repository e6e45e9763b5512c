# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's attributes of parameters: those of ZeRO 3, and those of a sharded model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed_autotp.interop.bitsandbytes import shape_of_4bit
from deepspeed_autotp.interop.deepspeed.module import deepspeed_module


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape, also of a parameter that ZeRO 3 has partitioned, and of a weight in 4 bits."""
    packed = shape_of_4bit(parameter)
    return tuple(getattr(parameter, "ds_shape", parameter.shape if packed is None else packed))


@contextmanager
def stating_shapes(shapes: Iterable[tuple[nn.Parameter, tuple[int, ...]]]) -> Iterator[None]:
    """Let parameters say the full shape as those that ZeRO 3 has partitioned do, for PEFT, which
    asks the weight of a Conv1D for its features."""
    stated: list[Any] = []
    try:
        for parameter, shape in shapes:
            written: Any = parameter
            written.ds_shape = torch.Size(shape)
            stated.append(parameter)
        yield
    finally:
        for parameter in stated:
            del parameter.ds_shape


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ``deepspeed.zero.Init`` has partitioned the parameter."""
    return hasattr(parameter, "ds_id")


def own_partition(parameter: Tensor) -> Tensor:
    """What this data-parallel rank has of a parameter: all of it, unless ZeRO 3 has partitioned
    it. Partitions have one size, and DeepSpeed leaves what is behind the values unwritten."""
    part: Tensor | None = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter
    partitioned: Any = parameter
    before = part.numel() * dist.get_rank(partitioned.ds_process_group)
    return part.narrow(0, 0, max(0, min(part.numel(), partitioned.ds_numel - before)))


def gathered_parameters(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """A context in which parameters that ZeRO 3 has partitioned are gathered."""
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        return nullcontext()
    context: AbstractContextManager[None] = deepspeed_module().zero.GatheredParameters(partitioned)
    return context


def copy_zero_status(tensor: Tensor, parameter: Tensor) -> None:
    """Give a tensor that replaces a parameter its ``ds_status``, which TRL reads."""
    if is_partitioned(parameter):
        read: Any = parameter
        written: Any = tensor
        written.ds_status = read.ds_status


# Attributes that zero.Init sets on a parameter, beside the names that begin with "ds_".
_PARTITIONED = frozenset(
    {
        *("all_gather", "all_gather_coalesced", "partition", "partition_gradients"),
        *("reduce_gradients_at_owner", "aligned_size", "padding_size", "partition_numel"),
        *("item", "convert_to_zero_parameters", "is_external_param", "nvme_swapper"),
    }
)


def remove_zero_partitioning(parameters: Iterable[nn.Parameter]) -> None:
    """Gather parameters that ``deepspeed.zero.Init`` has partitioned, in place and for good.

    Every rank that built the model calls it, and then has the full model.
    """
    for parameter in parameters:
        if is_partitioned(parameter):
            with gathered_parameters([parameter]):
                full = parameter.detach().clone()
            attributes = vars(parameter)
            for name in [n for n in attributes if n.startswith("ds_") or n in _PARTITIONED]:
                del attributes[name]
            parameter.data = full


class ParameterGatherer(Protocol):
    """The methods that DeepSpeed calls to gather and to partition the parameters of a module."""

    def gather_params(self, params_list: list[Tensor | None]) -> None: ...

    def _tp_partition(self, params_list: list[Tensor | None]) -> None: ...


def mark_parameters(
    parameters: Iterable[nn.Parameter],
    *,
    gatherer: ParameterGatherer,
    counted: Callable[[int], bool],
) -> None:
    """Give every parameter the attributes that DeepSpeed 0.19.8 reads.

    ``counted(i)`` says whether this rank counts parameter ``i`` in the gradient norm although
    it is not TP rank 0; DeepSpeed counts all parameters of TP rank 0. Which part of a fused
    weight it counts is settled in grad_norm.py.
    """
    for index, parameter in enumerate(parameters):
        written: Any = parameter
        written.gather_params = gatherer.gather_params
        written._tp_partition = gatherer._tp_partition
        written.ds_is_replaced_module = True
        written.tensor_model_parallel = counted(index)


def mark_model(model: nn.Module) -> None:
    """Tell DeepSpeed's engine that the model is sharded already."""
    written: Any = model
    written.ds_autotp_parsed = True


def is_shard_of_others(parameter: Tensor) -> bool:
    """Whether a tensor-parallel layer of DeepSpeed (``LinearLayer``) or Megatron-LM has
    marked the parameter as this rank's shard."""
    marks = ("tensor_model_parallel", "model_parallel")
    return any(getattr(parameter, mark, False) is True for mark in marks)


def mark_universal(
    model: nn.Module,
    info: Mapping[str, Any],
    parameters: Iterable[tuple[nn.Parameter, Mapping[str, Any]]],
) -> None:
    """Give a model and its parameters what DeepSpeed 0.19.8 reads when it makes and loads
    universal checkpoints."""
    written: Any = model
    written.universal_checkpoint_info = info
    for parameter, meta in parameters:
        described: Any = parameter
        described.ds_autotp_universal_checkpoint_meta = meta
