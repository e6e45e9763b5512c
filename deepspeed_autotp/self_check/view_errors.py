# SPDX-License-Identifier: Apache-2.0
"""What a module's own failure says of its integers: counts of heads under names of its own."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

_SHAPE = re.compile(r"shape '\[([-\d, ]+)\]' is invalid for input of size")
_LEAST = 2  # one head is as good as none


def likely_counts(module: nn.Module, error: Exception, *, local: Collection[str]) -> str:
    """A sentence about the integers of ``module`` that a view to a full size has used, beside
    those in ``local``, which are this rank's already; "" for another error."""
    found = _SHAPE.search(str(error))
    if found is None:
        return ""
    sizes = [int(size) for size in found[1].split(",")]
    names = [
        f"{key} ({value})"
        for key, value in vars(module).items()
        if type(value) is int
        and value >= _LEAST
        and key not in local
        and not key.endswith(("idx", "index"))
        if any(size > 0 and size % value == 0 for size in sizes)
    ]
    if not names:
        return ""
    return (
        f". Of its attributes {', '.join(names)} one may count heads, of which each rank needs the "
        "number of its own: those called num_heads, num_key_value_heads and num_key_value_groups "
        "become local"
    )
