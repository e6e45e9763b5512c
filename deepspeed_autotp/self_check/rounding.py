# SPDX-License-Identifier: Apache-2.0
"""Whether two tensors are equal but for rounding."""

from __future__ import annotations

import torch
from torch import Tensor

# Sums in another order differ by rounding; a wrong shard differs by about one. Between the
# two there is a wide gap, and these bounds are in it.
_BOUNDS = {
    torch.float64: 1e-6,  # norms compute in float32 whatever the model does
    torch.float32: 2e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 2e-1,
}


def root_mean_square(t: Tensor) -> float:
    """Of the elements that are finite; 0 without any."""
    finite = t.detach().double()
    finite = finite[finite.isfinite()]
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0


def differs(got: Tensor, expected: Tensor, *, least: float = 0.0) -> str | None:
    """How ``got`` differs from ``expected``, in words, or None where only rounding differs.

    The error is relative to the root mean square of ``expected``, or to ``least`` where that is
    larger: what should vanish is rounding alone, and no scale for itself.
    """
    if got.shape != expected.shape:
        return f"has shape {list(got.shape)} instead of {list(expected.shape)}"
    a, b = got.detach().double(), expected.detach().double()
    apart = torch.where(a == b, 0.0, a - b)  # equal infinities are equal
    scale = max(root_mean_square(b), least, 1e-30)
    error = float(apart.square().mean().sqrt()) / scale if apart.numel() else 0.0
    bound = _BOUNDS.get(expected.dtype, _BOUNDS[torch.float32])
    if error <= bound:
        return None
    return f"differs from the full model's by {error:.2g} of its norm (allowed {bound:.0e})"
