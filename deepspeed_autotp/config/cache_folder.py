# SPDX-License-Identifier: Apache-2.0
"""Where the package keeps what it can make again: ``AUTOTP_CACHE`` names a folder, or is "off"."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path | None:
    """The folder, which need not be there; None where nothing is kept.

    ValueError for a value that is neither.
    """
    value = os.environ.get("AUTOTP_CACHE")
    if value is None:
        try:
            return user_cache_path("deepspeed_autotp")
        except RuntimeError:  # a user without a home
            return None
    if value == "off":
        return None
    if not os.path.isabs(value):
        raise ValueError(
            f"AUTOTP_CACHE: got {value!r}, expected the absolute path of a folder, or off"
        )
    return Path(value)
