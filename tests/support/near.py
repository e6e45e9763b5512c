# SPDX-License-Identifier: Apache-2.0
"""Nearly equal numbers within dictionaries and lists."""

from typing import Any

import pytest


def near(value: Any, *, rel: float = 1e-4, abs: float = 1e-12) -> Any:
    """What is equal to ``value`` where whole numbers are equal and others near."""
    if isinstance(value, float):
        return pytest.approx(value, rel=rel, abs=abs)
    if isinstance(value, dict):
        return {key: near(each, rel=rel, abs=abs) for key, each in value.items()}
    return [near(each, rel=rel, abs=abs) for each in value] if isinstance(value, list) else value
