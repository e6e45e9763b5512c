# SPDX-License-Identifier: Apache-2.0
"""What the ranks do: train while what several of them hold differs a little, or more."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from tests.support.engine_config import Setting, engine_config
from tests.support.log_records import logged_warnings
from tests.support.raised_error import raised_error
from tests.support.small_models import build, tokens


@dataclass(frozen=True, slots=True)
class Change:
    """By which part of itself the last TP rank, or every rank, changes a parameter of the model, or
    one element of it."""

    name: str
    part: float
    element: int | None = None
    everywhere: bool = False


def _sharded(zero: int | None, **sizes: int) -> tuple[Any, nn.Module]:
    """What is called, and the model: with DeepSpeed unless ``zero`` is None."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, **sizes}
    model = build("llama", tied=False, **sizes)
    if zero is None:
        return deepspeed_autotp.parallelize(model, tp_size=2), model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed_autotp.initialize(
        model=model, optimizer=optimizer, config=engine_config(Setting(2, zero, clip=0.0))
    )
    return engine, model


def called(zero: int | None, changes: dict[int, Change], calls: int) -> tuple[list[str], str]:
    """Warnings, and the error, of some forwards; ``changes[call]`` is made before that call."""
    run, model = _sharded(zero)
    with logged_warnings() as said:
        error = raised_error(lambda: _run(run, model, changes, calls))
    return list(said), error


def partitioned_unevenly() -> tuple[list[str], str]:
    """As above at stage 3, where the last partition of a norm of 15 values has 7, and what is
    behind them differs between the ranks."""
    run, model = _sharded(3, hidden_size=15, num_attention_heads=3, head_dim=4)
    for parameter in model.parameters():
        partitioned: Any = parameter
        assert dist.get_world_size(partitioned.ds_process_group) == 2
        part, full = partitioned.ds_tensor, partitioned.ds_numel
        if dist.get_rank(partitioned.ds_process_group) == 1:
            part[full - part.numel() :].fill_(10.0 ** dist.get_rank())
    with logged_warnings() as said:
        error = raised_error(lambda: _run(run, model, {}, 4))
    return list(said), error


def _run(run: Any, model: nn.Module, changes: dict[int, Change], calls: int) -> None:
    ids = tokens(0)[:2]
    for call in range(1, calls + 1):
        change = changes.get(call)
        if change is not None and (change.everywhere or dist.get_rank() % 2):
            parameter: Any = model.get_parameter(change.name)
            values = getattr(parameter, "ds_tensor", parameter).data.view(-1)
            chosen = slice(None) if change.element is None else change.element
            values[chosen] *= 1 + change.part
        run(input_ids=ids, labels=ids)
