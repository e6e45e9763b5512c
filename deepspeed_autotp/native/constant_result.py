# SPDX-License-Identifier: Apache-2.0
"""A call that a compiled graph takes the result of as a constant.

Imports torch's compiler, which takes as long as torch: import it where it is used.
"""

from collections.abc import Callable

import torch

__all__ = ["constant_result"]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def constant_result(function: Callable[[int], bool], argument: int) -> bool:
    """``function(argument)``, which is called while a graph is made and not when it runs."""
    return function(argument)
