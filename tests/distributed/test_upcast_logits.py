# SPDX-License-Identifier: Apache-2.0
"""The loss computes in float32 from the shard of logits that a model in 16 bits upcasts."""

import pytest
import torch

from tests.distributed import upcast_logits_ranks
from tests.support.worker_pool import Pool

UPCAST = ["Upcast", "UpcastAtTimes", "UpcastInCap"]


@pytest.mark.parametrize("name", UPCAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("is_hooked", [False, True], ids=["", "under ZeRO 3's hooks"])
def test_loss_logits_and_gradients_are_those_of_one_process(
    pool: Pool, name: str, dtype: torch.dtype, is_hooked: bool
) -> None:
    step = torch.finfo(dtype).eps
    for found in pool.run(upcast_logits_ranks.against_one_process, name, dtype, is_hooked):
        assert found["loss"] < max(step, 1e-6) and found["logits"] < max(4 * step, 1e-6), found
        assert found["gradients"] < max(4 * step, 1e-5) and found["dtypes"], found


def test_the_shard_is_neither_copied_nor_kept(pool: Pool) -> None:
    assert pool.run(upcast_logits_ranks.memory) == [(1.0, True)] * 2
