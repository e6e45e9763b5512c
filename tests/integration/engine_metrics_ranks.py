# SPDX-License-Identifier: Apache-2.0
"""Run on every rank by tests.integration.test_engine_metrics."""

from collections.abc import Callable
from typing import Any

from torch import nn

import deepspeed_autotp
from benchmarks.step_calls import Recorder
from tests.support.engine_config import Setting, engine_config
from tests.support.loss_curves import sgd
from tests.support.small_models import build, tokens


def bytes_of_steps(folder: str, accumulate: int) -> list[int]:
    """What this rank gives to the collectives of each step but the first; an engine whose monitor
    writes into ``folder``."""
    model = build("llama", tied=False)
    config = engine_config(Setting(tp=2, zero=0, clip=0.0, accumulate=accumulate))
    config["tensor_parallel"]["monitor"] = True
    config["csv_monitor"] = {"enabled": True, "output_path": folder, "job_name": "job"}
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=sgd(model), config=config)
    counted = []
    for step in range(3):
        with Recorder() as recorder:
            for row in tokens(step).chunk(accumulate):
                engine.backward(engine(input_ids=row, labels=row).loss)
                engine.step()
        # Those of data parallelism are over one rank.
        counted.append(sum(call.size for call in recorder.calls if call.ranks == 2))
    engine.destroy()
    return counted[1:]


def refusals() -> list[str]:
    """What is said where nothing can be written."""
    config = engine_config(Setting(tp=2, zero=0, clip=0.0))
    config["tensor_parallel"]["monitor"] = True
    sharded = deepspeed_autotp.parallelize(build("llama", tied=False), tp_size=2)
    monitored = {**config, "csv_monitor": {"enabled": True, "output_path": "unused"}}
    return [
        _said(lambda: _engine(build("llama", tied=False), config)),
        _said(lambda: _engine(sharded, monitored)),
        _said(
            lambda: deepspeed_autotp.parallelize(
                build("llama", tied=False), tp_size=2, config={"monitor": True}
            )
        ),
    ]


def _engine(model: nn.Module, config: dict[str, Any]) -> None:
    deepspeed_autotp.initialize(model=model, optimizer=sgd(model), config=config)


def _said(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""
