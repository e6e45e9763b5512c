# SPDX-License-Identifier: Apache-2.0
"""Whether two tensors are equal but for rounding.

Sums in another order differ by rounding; a wrong head differs by about one over the root of the
number of heads, and a bias that is added twice by its part of the output. In float32 there is a
wide gap between the two. In 16 bits there is none that holds for every model: there a model runs in
float32, or else a run that is rounded otherwise shows what rounding does to each of its tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of norms over many elements. Norms of a model compute in float32 whatever the model does.
_BOUNDS = {
    torch.float64: 1e-6,
    torch.float32: 2e-3,
    # Where the other run does not have such a tensor, as when it chose other experts.
    torch.float16: 5e-2,
    torch.bfloat16: 2e-1,
}
# Of a number that is a mean over many tokens, as a loss.
_SCALAR_BOUNDS = {torch.float64: 1e-7, torch.float32: 2e-5}
# The other run is rounded more coarsely than a sharded one, by about four times.
_MARGIN = 2.0
# What two such runs may differ by even where they happen to agree: a few elements or one number.
_LEAST, _LEAST_SCALAR = 2e-2, 1e-2


def root_mean_square(t: Tensor) -> float:
    """Of the elements that are finite; 0 without any."""
    if (quick := _quick_mean(t.detach())) is not None:
        return quick
    finite = t.detach().double()
    finite = finite[finite.isfinite()]
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0


def difference(got: Tensor, expected: Tensor, *, least: float = 0.0) -> float:
    """Relative to the root mean square of ``expected``, or to ``least`` where that is larger: what
    should vanish is rounding alone, and no scale for itself."""
    if not got.numel():
        return 0.0
    a, b = got.detach(), expected.detach()
    scale = max(root_mean_square(b), least, 1e-30)
    if a.is_floating_point() and (quick := _quick_mean(a - b)) is not None:
        return quick / scale
    a, b = a.double(), b.double()
    apart = torch.where(a == b, 0.0, a - b)  # equal infinities are equal
    return float(apart.square().mean().sqrt()) / scale


def _quick_mean(t: Tensor) -> float | None:
    """The root mean square, in one pass without a copy in float64; None where that is not finite,
    or not of such a tensor."""
    if not t.numel() or not t.is_floating_point():
        return None
    norm = float(torch.linalg.vector_norm(t, dtype=torch.float64))
    return norm / math.sqrt(t.numel()) if math.isfinite(norm) else None


def differs(
    got: Tensor, expected: Tensor, *, least: float = 0.0, rounded: Tensor | None = None
) -> str | None:
    """How ``got`` differs from ``expected``, in words, or None where only rounding differs.

    ``rounded`` is the same of a run that is rounded otherwise, as a 16-bit model needs.
    """
    if got.shape != expected.shape:
        return f"has shape {list(got.shape)} instead of {list(expected.shape)}"
    error, bound = difference(got, expected, least=least), allowed(expected, rounded, least)
    if error <= bound:
        return None
    return f"differs from the full model's by {error:.2g} of its norm (allowed {bound:.0e})"


def allowed(expected: Tensor, rounded: Tensor | None, least: float = 0.0) -> float:
    """The largest ``difference`` that is rounding alone; ``rounded`` as in ``differs``."""
    is_scalar = expected.dim() == 0
    if rounded is not None and rounded.shape == expected.shape:
        measured = difference(rounded, expected, least=least)
        return max(_LEAST_SCALAR if is_scalar else _LEAST, _MARGIN * measured)
    known = _SCALAR_BOUNDS if is_scalar else _BOUNDS
    return known.get(expected.dtype, known[torch.float32])
