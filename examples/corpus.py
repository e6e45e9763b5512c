# SPDX-License-Identifier: Apache-2.0
"""Text that every Python has: the documentation topics behind ``help("topics")``, as bytes."""

from functools import cache
from pydoc_data.topics import topics

import torch

VOCABULARY = 256


@cache
def corpus() -> torch.Tensor:
    """All topics as one tensor of byte values, about half a million of them."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(text.encode()), dtype=torch.long)


def batch(step: int, *, rows: int, length: int) -> torch.Tensor:
    """``[rows, length]`` byte values, the same for the same step on every rank."""
    data = corpus()
    draw = torch.Generator().manual_seed(step)
    starts = torch.randint(0, len(data) - length, (rows,), generator=draw)
    return torch.stack([data[start : start + length] for start in starts.tolist()])
