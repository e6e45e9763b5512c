# SPDX-License-Identifier: Apache-2.0
"""The soft caps with which losses are formed from sharded logits."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from deepspeed_autotp.vocab_parallel import cross_entropy as losses_from_parts


@contextmanager
def recorded_soft_caps() -> Iterator[list[float]]:
    """The cap of every loss that is formed from shards."""
    seen: list[float] = []
    before = losses_from_parts.statistics

    def statistics(logits: Tensor, columns: Tensor, *, cap: float = 0.0) -> Tensor:
        seen.append(cap)
        return before(logits, columns, cap=cap)

    losses_from_parts.statistics = statistics
    try:
        yield seen
    finally:
        losses_from_parts.statistics = before
