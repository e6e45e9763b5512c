# SPDX-License-Identifier: Apache-2.0
"""The message of the ValueError of a call."""

from typing import Any

import pytest


def message_of(make: Any, *args: Any, **kwargs: Any) -> str:
    """What the ValueError says that ``make(*args, **kwargs)`` raises."""
    with pytest.raises(ValueError) as caught:
        make(*args, **kwargs)
    return str(caught.value)
