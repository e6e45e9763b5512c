# SPDX-License-Identifier: Apache-2.0
"""A model in whose weights nothing begins at zero.

What multiplies by zero, or by next to nothing, hides what lies behind it: projections and gates
that begin so have gradients themselves, but those of the weights before them vanish, and a sum over
the ranks that is missing there would not be seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deepspeed_autotp.sharding.conversion import replace_data

# A weight whose largest value is below this is taken for one that begins at zero.
_TINY = 1e-2
_SEED = 5


@torch.no_grad()
def tiny_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are zero, or next to it, everywhere."""
    return [p for p in model.parameters() if _is_tiny(p)]


def _is_tiny(parameter: Tensor) -> bool:
    if not (parameter.is_floating_point() and parameter.numel()) or parameter.is_meta:
        return False
    return float(torch.linalg.vector_norm(parameter.detach(), torch.inf)) < _TINY


@contextmanager
def drawn_values(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within it, ``parameters`` have values that are drawn, the same in each run and on each rank:
    matrices those of a usual start, and biases, scales and gates at least 0.1 away from zero."""
    before = [(p, p.data) for p in parameters]
    draw = torch.Generator().manual_seed(_SEED)
    try:
        for parameter, data in before:
            x = torch.randn(data.shape, generator=draw)
            x = x / data.shape[-1] ** 0.5 if data.dim() > 1 else (x + x.sign()) / 10
            replace_data(parameter, x.to(data))
        yield
    finally:
        for parameter, data in before:
            replace_data(parameter, data)
