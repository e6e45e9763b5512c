# SPDX-License-Identifier: Apache-2.0
"""A loss that never makes the logits is formed from the shards of the output head."""

import pytest

from tests.distributed import chunked_head_ranks
from tests.support.worker_pool import Pool

OPTIONS = [{}, {"temperature": 0.7, "soft_cap": 2.0, "scale": 1.5}]


@pytest.mark.sample(3)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "capped"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("used", ["log_probs", "entropy", "log_probs entropy"])
def test_shards_give_what_full_logits_give(
    pool: Pool, ranks: int, options: dict[str, float], bias: bool, used: str
) -> None:
    arguments = ("float32", bias, options, used)
    for tile in (1 << 20, 64):
        found = pool.run(chunked_head_ranks.against_full, *arguments, tile, ranks=ranks)
        for each in found:
            assert max(each["errors"]) < 1e-5 and each["top1"], each
            # One all-gather of seven numbers a token, one all-reduce of the hidden states.
            tokens, hidden = chunked_head_ranks.TOKENS, chunked_head_ranks.HIDDEN
            sizes = [("all-gather", 7 * tokens * 4), ("all-reduce", tokens * hidden * 4)]
            assert each["calls"] == sizes
        assert len({each["bits"] for each in found}) == 1


def test_bfloat16_is_as_near_as_its_products(pool: Pool) -> None:
    for found in pool.run(
        chunked_head_ranks.against_full, "bfloat16", True, {}, "log_probs entropy", 64
    ):
        assert max(found["errors"]) < 4e-2, found


def test_a_frozen_head_has_no_gradient(pool: Pool) -> None:
    assert pool.run(chunked_head_ranks.frozen) == [(True, 2)] * 2


def test_a_step_needs_a_fraction_of_the_logits(pool: Pool) -> None:
    assert max(pool.run(chunked_head_ranks.peak)) < 0.3


@pytest.mark.parametrize("outputs", ["log_probs", "log_probs entropy is_top1 mean_logits"])
def test_trls_kernel_says_the_same(pool: Pool, outputs: str) -> None:
    for found in pool.run(chunked_head_ranks.trl_kernel, outputs):
        assert found["same"] == 1.0 and found["apart"] < 1e-5
        assert found["fields"] == len(outputs.split())
