# SPDX-License-Identifier: Apache-2.0
"""Logits that are sharded over the ranks read as full logits."""

import pytest

from tests.distributed import logits_ranks
from tests.support.worker_pool import Pool


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_works_on_each_column_is_done_on_the_shards(pool: Pool, ranks: int) -> None:
    for found in pool.run(logits_ranks.compare, "shards", ranks=ranks):
        assert {name: x for name, x in found.items() if max(x[:2]) > 1e-12 or x[2]} == {}


@pytest.mark.parametrize("ranks", [2, 3])
def test_whatever_else_is_done_has_the_values_and_gradients_of_the_full_logits(
    pool: Pool, ranks: int
) -> None:
    for found in pool.run(logits_ranks.compare, "full", ranks=ranks):
        assert {name: x for name, x in found.items() if max(x[:2]) > 1e-12 or not x[2]} == {}


def test_a_cast_to_float32_waits_until_somebody_reads_it(pool: Pool) -> None:
    for found in pool.run(logits_ranks.sixteen_bit):
        kinds = ("torch.bfloat16", "torch.float32", "torch.float32", "torch.bfloat16")
        assert found.pop("dtypes") == kinds
        assert [name for name, right in found.items() if not right] == []


def test_every_way_out_of_torch_gives_full_logits(pool: Pool) -> None:
    for found in pool.run(logits_ranks.ways_out):
        assert [name for name, right in found.items() if not right] == []


def test_one_rank_alone_can_print_them(pool: Pool) -> None:
    assert pool.run(logits_ranks.printed) == [
        ["Logits([2, 3, 13], torch.float64; gathered when used)"] * 3,
        [],
    ]


def test_using_them_first_after_the_backward_is_an_error(pool: Pool) -> None:
    for *late, view in pool.run(logits_ranks.too_late):
        assert all(
            "before loss.backward(), take a clone() of outputs.logits" in said for said in late
        )
        assert "modified in place through another view" in view


def test_what_was_used_before_the_backward_stays(pool: Pool) -> None:
    assert pool.run(logits_ranks.used_in_time) == [(True, 2)] * 2
