# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's attributes of parameters: those of ZeRO 3, and those of a sharded model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn

from deepspeed_autotp.interop.deepspeed.module import deepspeed_module


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape as a layer, also of a parameter that ZeRO 3 has already partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ``deepspeed.zero.Init`` holds this parameter's weight."""
    return hasattr(parameter, "ds_id")


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Within it, parameters that ZeRO 3 partitioned over the data-parallel ranks are there."""
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        return nullcontext()
    context: AbstractContextManager[None] = deepspeed_module().zero.GatheredParameters(partitioned)
    return context


def stand_in(stand: Tensor, parameter: Tensor) -> None:
    """Let a tensor in a parameter's place answer whether ZeRO 3 holds the weight, as TRL asks."""
    if is_partitioned(parameter):
        there: Any = parameter
        written: Any = stand
        written.ds_status = there.ds_status


# What zero.Init gives a parameter beside the names that begin with "ds_".
_PARTITIONED = frozenset(
    {
        *("all_gather", "all_gather_coalesced", "partition", "partition_gradients"),
        *("reduce_gradients_at_owner", "aligned_size", "padding_size", "partition_numel"),
        *("item", "convert_to_zero_parameters", "is_external_param", "nvme_swapper"),
    }
)


def make_plain(parameters: Iterable[nn.Parameter]) -> None:
    """Make parameters that ``deepspeed.zero.Init`` holds whole and ordinary, in place.

    Every rank that built the model calls it, and then holds the whole model.
    """
    for parameter in parameters:
        if is_partitioned(parameter):
            with gathered([parameter]):
                whole = parameter.detach().clone()
            attributes = vars(parameter)
            for name in [n for n in attributes if n.startswith("ds_") or n in _PARTITIONED]:
                del attributes[name]
            parameter.data = whole


class ParameterKeeper(Protocol):
    """What DeepSpeed calls to make a module's parameters whole and to cut them again."""

    def gather_params(self, params_list: list[Tensor | None]) -> None: ...

    def _tp_partition(self, params_list: list[Tensor | None]) -> None: ...


def mark_parameters(
    parameters: Iterable[nn.Parameter], *, keeper: ParameterKeeper, counted: Callable[[int], bool]
) -> None:
    """Give every parameter the attributes that DeepSpeed 0.19.8 reads.

    ``counted(i)`` says whether this rank counts parameter ``i`` in the gradient norm although
    it is not the first rank; DeepSpeed counts all of the first rank's.
    """
    for index, parameter in enumerate(parameters):
        written: Any = parameter
        written.gather_params = keeper.gather_params
        written._tp_partition = keeper._tp_partition
        written.ds_is_replaced_module = True
        written.tensor_model_parallel = counted(index)


def mark_model(model: nn.Module) -> None:
    """Tell DeepSpeed's engine that the model is partitioned already."""
    written: Any = model
    written.ds_autotp_parsed = True
