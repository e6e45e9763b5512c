# SPDX-License-Identifier: Apache-2.0
"""Without DeepSpeed an optimizer that forms a number over a tensor may not step shards."""

from tests.distributed import optimizer_check_ranks
from tests.support.worker_pool import Pool


def test_a_step_of_shards_is_refused_and_others_are_not(pool: Pool) -> None:
    for whole, replicated, other, unsharded in pool.run(optimizer_check_ranks.steps):
        text, moved = whole
        assert text.startswith("ValueError: the optimizer of a sharded model: got Adafactor, which")
        assert not moved
        assert [replicated, other, unsharded] == [("nothing", True)] * 3


def test_the_check_ends_with_the_model(pool: Pool) -> None:
    for before, during, after in pool.run(optimizer_check_ranks.hooks):
        assert (during, after) == (before + 1, before)
