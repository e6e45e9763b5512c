# SPDX-License-Identifier: Apache-2.0
"""Values of ours in DeepSpeed's monitor: csv files, TensorBoard, Weights & Biases, Comet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

SECTIONS = ("csv_monitor", "tensorboard", "wandb", "comet")


def is_monitored(config: Mapping[str, Any]) -> bool:
    """Whether a configuration enables a monitor."""
    sections = (config.get(key) for key in SECTIONS)
    return any(isinstance(each, Mapping) and each.get("enabled") is True for each in sections)


def write_at_steps(engine: Any, values: Callable[[], Iterable[tuple[str, float]]]) -> None:
    """Write ``values()`` after each step of ``engine`` that updates weights, on rank 0 of the run.

    They stand beside DeepSpeed's own values, and over the number of samples as these.
    """
    step = engine.step

    def stepped(*args: Any, **kwargs: Any) -> Any:
        updates = engine.is_gradient_accumulation_boundary()
        result = step(*args, **kwargs)
        if updates:
            samples = engine.global_samples
            named = [(f"Train/Samples/{name}", value, samples) for name, value in values()]
            engine.monitor.write_events(named)
        return result

    engine.step = stepped
