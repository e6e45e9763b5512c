# SPDX-License-Identifier: Apache-2.0
"""Quantised weights that a plan shards: which of them can be."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from deepspeed_autotp._core import Entry, Kind, Plan
from deepspeed_autotp.interop.bitsandbytes import block_size, is_4bit, is_linear_4bit
from deepspeed_autotp.interop.transformers import model_facts
from deepspeed_autotp.planning.model_description import Description

_SKIP = "leave it replicated with partition_type 'skip' in tensor_parallel.partition_config"


def refuse_quantized(description: Description, plan: Plan) -> None:
    """ValueError for a quantised weight that ``plan`` shards and that cannot be."""
    pairs = list(zip(plan.entries, description.parameters, strict=True))
    multiplied = set(map(id, _multiplied(description, plan)))
    divided = {index for layer in plan.layers for index in layer.divided}
    for index, (entry, parameter) in enumerate(pairs):
        if is_4bit(parameter):
            if index in divided or (entry.is_sharded and id(parameter) not in multiplied):
                raise ValueError(
                    f"{entry.name}: got a weight in 4 bits, expected one in floating point: it is "
                    "the weight of an output head, or used for more than products; name its module "
                    f"in llm_int8_skip_modules of the BitsAndBytesConfig, or {_SKIP}"
                )
            if entry.is_sharded:
                _check_blocks(entry, parameter, plan.ranks)
        elif entry.is_sharded and not _is_plain(parameter):
            raise ValueError(
                f"{entry.name}: got {parameter.dtype}, a quantised weight, expected one in "
                "floating point, or in 4 bits of bitsandbytes: the scales that belong to it are "
                f"not known; load the model without quantisation, or {_SKIP}"
            )


def _is_plain(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and parameter.itemsize > 1


def _check_blocks(entry: Entry, parameter: nn.Parameter, ranks: int) -> None:
    try:
        size = block_size(parameter)
    except ValueError as error:
        raise ValueError(f"{entry.name}: {error}") from None
    try:
        for rank in range(ranks):
            entry.blocks(rank, size)
    except ValueError as error:
        raise ValueError(
            f"{error}, as which bitsandbytes has quantised it: choose another TP size, {_SKIP}, or "
            f"where rows are multiples of {size} set tensor_parallel.tp_grain_size to {size}"
        ) from None


def _multiplied(description: Description, plan: Plan) -> Iterator[nn.Parameter]:
    """The weights of sharded linears, but for that of the output head."""
    head = model_facts(description.modules[""]).output_head
    inside = set() if head is None else set(head.modules())
    for layer in plan.layers:
        module = description.modules[layer.module]
        is_product = layer.kind in (Kind.COLUMN, Kind.ROW) and is_linear_4bit(module)
        if is_product and module not in inside:
            yield description.parameters[layer.weight]
