# SPDX-License-Identifier: Apache-2.0
"""Losses that are fused with the output head for few tokens, too."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from deepspeed_autotp.vocab_parallel import cross_entropy, head_product


@contextmanager
def loss_chunks(tokens: int) -> Iterator[list[int]]:
    """Within it a chunk has ``tokens`` tokens, and losses in bfloat16 are fused on a CPU, too. The
    tokens of all logits that losses are formed of, be it of a chunk or of all tokens."""
    seen: list[int] = []
    before = cross_entropy.statistics

    def statistics(logits: Tensor, columns: Tensor, *, cap: float = 0.0) -> Tensor:
        seen.append(logits.shape[0])
        return before(logits, columns, cap=cap)

    with (
        mock.patch.multiple(
            head_product,
            _CPU_TOKENS=tokens,
            _CPU_BYTES=0,
            _CPU_DTYPES={torch.float32, torch.float64, torch.bfloat16},
        ),
        mock.patch.object(cross_entropy, "statistics", statistics),
    ):
        yield seen
