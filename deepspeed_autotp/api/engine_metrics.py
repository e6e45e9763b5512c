# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a TP group send in a training step, in the monitor of DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist

from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.distributed.metered_group import CollectiveMeter, MeteredGroup
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.deepspeed.monitor import SECTIONS, is_monitored, write_at_steps
from deepspeed_autotp.state.sharded_model import TensorParallel

_KEY = "tensor_parallel.monitor"


def check_monitor(
    settings: TPTrainingConfig, config: Mapping[str, Any], sharded: TensorParallel | None
) -> None:
    """ValueError where values are to be written and no monitor of DeepSpeed is enabled, or the
    model was ``sharded`` before without."""
    if not settings.monitor:
        return
    if sharded is not None and sharded.settings.get(_KEY) != str(True):
        raise ValueError(
            f"{_KEY}: got true, but the model was sharded before without it; shard it by this "
            "initialize, or leave it out"
        )
    if not is_monitored(config):
        raise ValueError(
            f"{_KEY}: got true, but no monitor of DeepSpeed is enabled; enable one of "
            f"{', '.join(SECTIONS)}, or leave it out"
        )


def engine_tp_group(handle: dist.ProcessGroup, settings: TPTrainingConfig) -> TPGroup:
    """The group of an engine: on the rank that writes, one that measures where that is asked."""
    is_metered = settings.monitor and dist.get_rank() == 0
    return MeteredGroup(handle) if is_metered else TPGroup(handle)


def write_metrics(engine: Any, group: TPGroup, *, is_asked: bool) -> None:
    """Write bytes, time and share of the collectives of ``group`` after each step, where that is
    asked, and on the rank that writes."""
    if is_asked and isinstance(group, MeteredGroup):
        group.meter.take()
        write_at_steps(engine, lambda: _values(group.meter))


def _values(meter: CollectiveMeter) -> Iterator[tuple[str, float]]:
    found = meter.take()
    yield "tp_communication_bytes", found.nbytes
    yield "tp_communication_ms", 1000 * found.seconds
    yield "tp_communication_share", found.seconds / found.elapsed
