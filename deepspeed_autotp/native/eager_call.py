# SPDX-License-Identifier: Apache-2.0
"""A call that breaks a compiled graph, and is made when the graph runs.

Imports torch's compiler, which takes as long as torch: import it where it is used.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

__all__ = ["eager_call"]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def eager_call(function: Callable[[T], None], argument: T) -> None:
    """``function(argument)``, which is not traced."""
    function(argument)
