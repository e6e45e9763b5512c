# SPDX-License-Identifier: Apache-2.0
"""The local part of a sharded cross-entropy: statistics and gradient of one rank's columns.

Logits are [T, W], this rank's columns; ``columns`` [T] are the labels counted from this rank's
first column, outside of [0, W) where another rank holds the label or there is none. With a soft
cap c, which is 0 for none, the loss sees c tanh(x / c) in place of a logit x.

On a GPU where the CUDA library runs, two kernels: one pass reads the logits, one writes the
gradient over them. Elsewhere torch's operations, in chunks of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from deepspeed_autotp.native import operators

__all__ = ["differentiate", "differentiate_", "statistics"]

# Bytes of the only temporary, in the dtype of sums. Three passes go over it, so on a CPU it should
# stay in a cache: with 1024 tokens and 32768 columns on one core, 64 MiB take twice as long as
# 4 MiB, and 256 KiB a sixth longer. On a GPU a launch costs as much time as reading some MiB, so a
# chunk has to be larger to hide that.
_CPU_CHUNK = 4 << 20
_DEVICE_CHUNK = 64 << 20

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def statistics(logits: Tensor, columns: Tensor, *, cap: float = 0.0) -> Tensor:
    """[3, T]: the largest logit, the sum of exponentials below it, and the label's logit or 0.

    In float32, and in float64 for float64 logits.
    """
    if _has_kernel(logits):
        found: Tensor = operators.loaded().vocab_statistics(logits, columns.contiguous(), cap)
        return found
    return _statistics(logits, columns, cap)


def differentiate_(
    logits: Tensor, logsumexp: Tensor, columns: Tensor, scale: Tensor, *, cap: float = 0.0
) -> None:
    """Overwrite the logits with scale (exp(logits - logsumexp) - [column is the label's]).

    ``logsumexp`` and ``scale`` are [T], of all ranks' columns. A row whose scale is 0 is 0,
    whatever its logits are.
    """
    if _has_kernel(logits):
        rows = (logsumexp.contiguous(), columns.contiguous(), scale.contiguous())
        operators.loaded().vocab_gradient_(logits, *rows, cap)
        torch.autograd.graph.increment_version(logits)
    else:
        _differentiate_(logits, logsumexp, columns, scale, cap)


def differentiate(
    logits: Tensor, logsumexp: Tensor, columns: Tensor, scale: Tensor, *, cap: float = 0.0
) -> Tensor:
    """As ``differentiate_``, but a new tensor; the logits keep their values."""
    if _has_kernel(logits):
        gradient = logits.clone()
        differentiate_(gradient, logsumexp, columns, scale, cap=cap)
        return gradient
    gradient = torch.empty_like(logits)
    _write_gradient(gradient, logits, logsumexp, columns, scale, cap)
    return gradient


def _has_kernel(logits: Tensor) -> bool:
    return logits.dtype in _KERNEL_DTYPES and logits.is_contiguous() and operators.on_gpu(logits)


def _statistics(logits: Tensor, columns: Tensor, cap: float) -> Tensor:
    width = logits.shape[1]
    found = logits.new_zeros(3, logits.shape[0], dtype=_summed(logits))
    found[0].fill_(-math.inf)
    if width == 0:
        return found
    elsewhere = (columns < 0) | (columns >= width)
    column = columns.masked_fill(elsewhere, 0).unsqueeze(1)
    for rows, space in _chunks(logits):
        x = _capped(logits[rows], cap, space=space)
        largest = torch.amax(x, 1, keepdim=True).to(found.dtype)
        found[0, rows] = largest.squeeze(1)
        found[2, rows] = x.gather(1, column[rows]).squeeze(1).to(found.dtype)
        # A row of nothing but -inf has no exponentials; minus its own maximum it would be NaN.
        torch.sub(x, largest.masked_fill_(largest == -math.inf, 0), out=space)
        found[1, rows] = space.exp_().sum(1)
    found[2].masked_fill_(elsewhere, 0)
    return found


def _differentiate_(
    logits: Tensor, logsumexp: Tensor, columns: Tensor, scale: Tensor, cap: float
) -> None:
    _write_gradient(logits, logits, logsumexp, columns, scale, cap)


def _write_gradient(
    gradient: Tensor, logits: Tensor, logsumexp: Tensor, columns: Tensor, scale: Tensor, cap: float
) -> None:
    """``gradient`` may be ``logits``."""
    width = logits.shape[1]
    if width == 0:
        return
    here = ((columns >= 0) & (columns < width)).to(logsumexp.dtype).neg_().unsqueeze(1)
    column = columns.clamp(0, width - 1).unsqueeze(1)
    nothing = (scale == 0).unsqueeze(1)
    for rows, space in _chunks(logits):
        x = _capped(logits[rows], cap, space=space)
        slope = scale[rows].unsqueeze(1)
        if cap:  # its own derivative, 1 - tanh(x / c)^2
            slope = (x / cap).square_().neg_().add_(1).mul_(slope)
        torch.sub(x, logsumexp[rows].unsqueeze(1), out=space).exp_()
        space.scatter_add_(1, column[rows], here[rows]).mul_(slope)
        gradient[rows] = space.masked_fill_(nothing[rows], 0)


def _register_cpu_kernels() -> None:
    torch.library.impl("deepspeed_autotp::vocab_statistics", "cpu", _statistics)
    torch.library.impl("deepspeed_autotp::vocab_gradient_", "cpu", _differentiate_)


operators.when_loaded(_register_cpu_kernels)


@operators.fake("vocab_statistics")
def _statistics_fake(logits: Tensor, columns: Tensor, cap: float) -> Tensor:
    return logits.new_empty(3, logits.shape[0], dtype=_summed(logits))


@operators.fake("vocab_gradient_")
def _differentiate_fake(
    logits: Tensor, logsumexp: Tensor, columns: Tensor, scale: Tensor, cap: float
) -> None:
    return None


def _capped(x: Tensor, cap: float, *, space: Tensor) -> Tensor:
    """The capped logits of ``x``; where there is a cap they are written to ``space``."""
    return space.copy_(x).div_(cap).tanh_().mul_(cap) if cap else x


def _summed(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of ``logits``, and the same temporary for each of them in the dtype of sums."""
    tokens, width = logits.shape
    dtype = _summed(logits)
    size = _CPU_CHUNK if logits.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, min(size // (width * dtype.itemsize), tokens))
    space = logits.new_empty(step, width, dtype=dtype)
    for first in range(0, tokens, step):
        rows = slice(first, min(first + step, tokens))
        yield rows, space[: rows.stop - first]
