# SPDX-License-Identifier: Apache-2.0
"""The module ``deepspeed``, where it is installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

TESTED = "0.19.8"


def tested_and_found() -> str:
    """The version that this folder is written for and tested with, and the one installed."""
    return f"tested with DeepSpeed {TESTED}, found {importlib.metadata.version('deepspeed')}"


def deepspeed_module() -> ModuleType:
    """The deepspeed module; ImportError says what to install."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            "initialize and install need DeepSpeed: pip install 'deepspeed>=0.19'. "
            "A training loop without DeepSpeed can use deepspeed_autotp.parallelize(model, ...)."
        )
    return importlib.import_module("deepspeed")
