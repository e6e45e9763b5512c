# SPDX-License-Identifier: Apache-2.0
"""transformers' ``from_pretrained`` under ZeRO 3 with a TP size in the configuration.

transformers 5.23 refuses to convert weights then, as DeepSpeed might slice what it loads. Before
``initialize`` it slices nothing: the model is partitioned by ZeRO 3, and not sharded yet.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from deepspeed_autotp.interop.replaced import Replaced
from deepspeed_autotp.interop.versions import required

_NAME = "_apply_weight_conversions_to_state_dict"


def load_under_zero3(replaced: Replaced) -> None:
    """Let transformers convert weights whatever the TP size of its DeepSpeed configuration."""
    module = importlib.import_module("transformers.integrations.deepspeed")
    original = required(module, _NAME, project="transformers", needed_for="install()")
    replaced.put(module, _NAME, functools.partial(_converted, module, original))


def _converted(
    module: Any, original: Callable[..., Iterator[Any]], *args: Any, **kwargs: Any
) -> Iterator[Any]:
    made = original(*args, **kwargs)
    asked = module.deepspeed_config

    def without_tp() -> Any:
        config = asked()
        return config and {k: v for k, v in config.items() if k != "tensor_parallel"}

    # It asks at its beginning.
    module.deepspeed_config = without_tp
    try:
        first = list(islice(made, 1))
    finally:
        module.deepspeed_config = asked
    yield from first
    yield from made
