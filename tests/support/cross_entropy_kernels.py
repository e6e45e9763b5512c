# SPDX-License-Identifier: Apache-2.0
"""The cross-entropy kernels compiled for a CPU, a batch for them, and what float64 gives."""

import torch
from torch import Tensor

from tests.support.emulated_cuda import Args, Library

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Of the largest gradient, by what the dtype resolves.
ROUNDING = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


class EmulatedKernels:
    """Statistics and gradient as ``vocab_parallel.cross_entropy_kernels`` has them."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def statistics(self, logits: Tensor, columns: Tensor, *, cap: float = 0.0) -> Tensor:
        found = torch.empty(3, logits.shape[0])
        args = arguments(logits, columns, cap)
        args.statistics = found.data_ptr()
        assert self.library.statistics(args) == 0
        return found

    def differentiate_(
        self, logits: Tensor, logsumexp: Tensor, columns: Tensor, scale: Tensor, *, cap: float = 0.0
    ) -> None:
        args = arguments(logits, columns, cap)
        args.logsumexp, args.scale = logsumexp.data_ptr(), scale.data_ptr()
        assert self.library.gradient(args) == 0


def arguments(logits: Tensor, columns: Tensor, cap: float) -> Args:
    """Of both kernels, without what only one of them has."""
    assert logits.is_contiguous() and columns.dtype == torch.int64
    tokens, width = logits.shape
    args = Args(tokens=tokens, width=width, cap=cap, type=TYPES[logits.dtype])
    args.logits, args.columns = logits.data_ptr(), columns.data_ptr()
    return args


def batch(width: int, dtype: torch.dtype, *, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Logits ``offset`` elements off an aligned address, one row of each kind, and labels."""
    draw = torch.Generator().manual_seed(width)
    rows = torch.randn(6, width, generator=draw) * 6
    rows[1] += 80  # far from zero
    rows[2, ::2] = -torch.inf
    rows[3] = -torch.inf  # forbidden columns alone
    memory = torch.empty(6 * width + offset, dtype=dtype)
    logits = memory[offset:].view(6, width).copy_(rows)
    columns = torch.tensor([0, width - 1, width // 2 | 1, 0, -1, width])
    return logits, columns.clamp(max=width)


def exact(logits: Tensor, columns: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: logsumexp, the label's logit or 0, and the gradient of logsumexp - label."""
    x = logits.double().requires_grad_()
    y = cap * torch.tanh(x / cap) if cap else x
    width = logits.shape[1]
    here = (columns >= 0) & (columns < width)
    total = torch.logsumexp(y, 1)
    label = torch.where(here, y.gather(1, columns.clamp(0, width - 1).unsqueeze(1)).squeeze(1), 0)
    rows = total.isfinite()
    (total[rows].sum() - label[rows & here].sum()).backward()
    assert x.grad is not None
    return total.detach(), label.detach(), x.grad
