# SPDX-License-Identifier: Apache-2.0
"""Experts, latent attention and the like train as in one process, and are sharded."""

import pytest

from tests.integration.architectures_ranks import INCOMPLETE, train, train_experts
from tests.support.architectures import ARCHITECTURES
from tests.support.worker_pool import Pool


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_and_latents_train_as_in_one_process(pool: Pool, name: str, ranks: int) -> None:
    for trained in pool.run(train, name, ranks=ranks, timeout=110):
        assert trained.left == []
        assert trained.apart < 1e-5
        assert trained.weights < 1e-4
        assert trained.kinds & {"experts", "norm"}
        # The plan of deepseek_v3 leaves its attention replicated.
        assert trained.share < (0.62 if ranks == 2 else 0.45)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", INCOMPLETE)
def test_a_model_whose_plan_lacks_something_is_sharded_all_the_same(pool: Pool, name: str) -> None:
    ranks, warning, most = INCOMPLETE[name]
    first, *others = pool.run(train, name, ranks=ranks, timeout=110)
    assert [text[: len(warning)] for text in first.left] == [warning][: bool(warning)]
    for trained in (first, *others):
        assert trained.apart < 1e-5
        assert trained.weights < 1e-4
        assert trained.share < most


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_grouped_gemms_take_the_shards_of_three_ranks(pool: Pool, name: str) -> None:
    for trained, apart in pool.run(train_experts, name, ranks=3, timeout=110):
        assert trained.left == []
        assert trained.apart < 1e-5
        assert trained.weights < 1e-4
        assert trained.share < 0.4
        assert apart < 0.01
