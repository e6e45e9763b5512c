# SPDX-License-Identifier: Apache-2.0
"""Where within a stage a fault is: functions of the package that a faulty rank calls otherwise."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import deepspeed
import torch

from deepspeed_autotp.api import pipeline
from deepspeed_autotp.api.engine_setup import EngineSetup
from deepspeed_autotp.distributed import consensus
from deepspeed_autotp.distributed.owned_groups import OwnedGroups
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.self_check.self_check import SelfCheck
from tests.support.faults.rank import Rank

_SUMS = ((TPGroup, "all_reduce"), (TPGroup, "start_all_reduce"))
# By way and stage, what has the fault.
POINTS: dict[tuple[str, str], tuple[tuple[Any, str], ...]] = {
    ("loop", "plan"): ((pipeline, "plan_to_check"),),
    ("loop", "self-check"): _SUMS,
    ("loop", "shard"): ((pipeline, "broadcast_rng_state"),),
    ("loop", "forward"): _SUMS,
    ("loop", "backward"): _SUMS,
    ("loop", "step"): _SUMS,
    ("loop", "save"): ((TPGroup, "announce"),),
    ("loop", "load"): ((consensus, "exchange_objects"),),
    ("loop", "close"): ((OwnedGroups, "close"),),
    ("engine", "merge"): ((EngineSetup, "_merged"),),
    ("engine", "step"): ((deepspeed.comm, "all_reduce"),),
    ("engine", "save"): ((consensus, "exchange_objects"),),
    ("engine", "load"): ((consensus, "exchange_objects"),),
    ("engine", "close"): ((OwnedGroups, "close"),),
}
_INNER = ("killed", "stopped", "throws")
# Faults that are within a stage, and not of a user's call of it or of what it is given.
FAULTS_WITHIN: dict[str, tuple[str, ...]] = {
    "self-check": (*_INNER, "skips", "repeats"),
    "shard": (*_INNER, "skips", "repeats"),
    "forward": (*_INNER, "nan"),
    "backward": (*_INNER, "nan", "shape"),
    "step": (*_INNER, "shape"),
}


def put(rank: Rank, stack: ExitStack) -> None:
    """Give a faulty rank its fault until ``stack`` closes."""
    cell = rank.cell
    if not rank.is_faulty or cell.fault not in FAULTS_WITHIN.get(cell.stage, _INNER):
        return
    if cell.stage == "self-check":
        original = SelfCheck._compared
        stack.enter_context(mock.patch.object(SelfCheck, "_compared", _staged(rank, original)))
    for owner, name in POINTS[cell.way, cell.stage]:
        called = _faulty(rank, vars(owner)[name])
        stack.enter_context(mock.patch.object(owner, name, called))


def _staged(rank: Rank, original: Callable[..., Any]) -> Callable[..., Any]:
    def within(*args: Any, **named: Any) -> Any:
        before, rank.stage = rank.stage, "self-check"
        try:
            return original(*args, **named)
        finally:
            rank.stage = before

    return within


def _faulty(rank: Rank, original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, of which one call has the fault. What is summed is its last argument."""

    def call(*args: Any, **named: Any) -> Any:
        if not rank.is_due():
            return original(*args, **named)
        if rank.cell.fault in _INNER:
            rank.strike()
            return original(*args, **named)
        rank.begin()
        if rank.cell.fault == "skips":
            return args[-1] if args else None
        if rank.cell.fault == "repeats":
            original(*args, **named)
            return original(*args, **named)
        group, x = args
        if rank.cell.fault == "nan":
            return original(group, x.fill_(torch.nan))
        original(group, torch.zeros(x.numel() + 1, dtype=x.dtype))
        return x

    return call
