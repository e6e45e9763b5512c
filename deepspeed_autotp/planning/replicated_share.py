# SPDX-License-Identifier: Apache-2.0
"""What a plan leaves whole on every rank."""

from __future__ import annotations

import math
import re
from collections import Counter

from deepspeed_autotp._core import Plan
from deepspeed_autotp.self_check.compare import starred

# A rank that holds more than this share of the parameters gains next to nothing.
_MOST = 0.9
_NAMED = 3


def little_cut(plan: Plan) -> str | None:
    """What to tell the user of a plan that leaves nearly everything whole, or None."""
    entries = [entry for entry in plan.entries if entry.tied_to < 0]
    total = sum(math.prod(entry.shape) for entry in entries)
    held = max(
        sum(math.prod(entry.local_shape(rank)) for entry in entries) for rank in range(plan.ranks)
    )
    if plan.ranks == 1 or held <= _MOST * total:
        return None
    whole: Counter[str] = Counter()
    for entry in entries:
        if entry.dim < 0:
            whole[starred(entry.name)] += math.prod(entry.shape)
    largest = whole.most_common(_NAMED)
    parts = ", ".join(f"{name} ({size / total:.2f})" for name, size in largest)
    pattern = re.escape(largest[0][0]).replace(re.escape("*"), "[0-9]+") + "$"
    return (
        f"a rank holds {held / total:.2f} of the parameters, since the plan cuts little. Largest "
        f"among what stays whole: {parts}. To cut it, write rules in tensor_parallel."
        "partition_config, which takes the place of the model's own plan, as layer_specs like "
        f'{{"patterns": ["{_quoted(pattern)}"], "partition_type": "column"}}: "column" where '
        'features are made, "row" in the layer that takes them'
    )


def _quoted(pattern: str) -> str:
    """As it stands inside of JSON."""
    return pattern.replace("\\", "\\\\")
