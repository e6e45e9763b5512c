# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's activation checkpointing draws the same dropout masks again."""

import pytest
import torch

from tests.integration import dropout_ranks
from tests.support.worker_pool import Pool


@pytest.mark.parametrize("heads", [4, 5])
def test_deepspeed_recomputes_with_the_same_masks(pool: Pool, heads: int) -> None:
    found = pool.run(dropout_ranks.checkpointed, heads)
    for grads, again, masks, behind in found:
        assert all(
            torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(grads, again, strict=True)
        )
        assert all(len(seen) == 2 and torch.equal(*seen) for seen in masks)
        assert behind == found[0][3] and behind[0] == behind[1]
