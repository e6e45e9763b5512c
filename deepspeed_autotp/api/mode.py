# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's process-wide switch between AutoTP for training and for inference."""

from __future__ import annotations

from deepspeed_autotp.interop.deepspeed.engine import engine_mode_is_training, set_engine_mode


def set_autotp_mode(training: bool = False) -> None:
    """Set DeepSpeed's mode; the package itself always trains."""
    set_engine_mode(training=training)


def is_autotp_training_mode() -> bool:
    """Whether the mode is training. Without DeepSpeed it always is."""
    return engine_mode_is_training()
