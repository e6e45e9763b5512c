# SPDX-License-Identifier: Apache-2.0
"""The error of a call, as text that a rank can return."""

from collections.abc import Callable
from typing import Any


def raised_error(call: Callable[[], Any]) -> str:
    """What ``call`` raises, as "type: message", or "nothing"."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
