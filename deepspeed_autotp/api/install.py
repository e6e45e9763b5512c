# SPDX-License-Identifier: Apache-2.0
"""Our functions in the place of DeepSpeed's, for code that calls DeepSpeed by name."""

from __future__ import annotations

from deepspeed_autotp.api.deepspeed_api import initialize, tp_model_init
from deepspeed_autotp.interop.accelerate import forget_loaders, watch_loaders
from deepspeed_autotp.interop.deepspeed.replace_functions import (
    install_functions,
    uninstall_functions,
)


def install() -> None:
    """From now on ``deepspeed.initialize`` and ``deepspeed.tp_model_init`` are ours.

    transformers, Accelerate and TRL look both up when they call them. Nothing else of
    DeepSpeed changes; calling it twice is harmless. ImportError where DeepSpeed is missing. The
    self-check of a model whose inputs are not known takes a batch of the data that Accelerate has
    prepared last.
    """
    install_functions({"initialize": initialize, "tp_model_init": tp_model_init})
    watch_loaders()


def uninstall() -> None:
    """Put DeepSpeed's own functions back; harmless where ours are not in place."""
    uninstall_functions()
    forget_loaders()
