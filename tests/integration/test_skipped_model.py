# SPDX-License-Identifier: Apache-2.0
"""Rules that skip everything give an engine with TP groups, in which DeepSpeed's layers work."""

from pathlib import Path

import pytest

from tests.integration import skipped_model_ranks
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool


@pytest.mark.parametrize(
    ("own_layers", "zero", "ranks"),
    [
        (True, 0, 2),
        pytest.param(True, 1, 2, marks=pytest.mark.long),
        pytest.param(True, 0, 4, marks=pytest.mark.long),
        *((True, 2, 4), (True, 3, 4)),
        *((False, 0, 2), (False, 1, 4)),
    ],
)
def test_it_trains_as_one_process_does(
    pool: Pool, tmp_path: Path, own_layers: bool, zero: int, ranks: int
) -> None:
    found = pool.run(
        skipped_model_ranks.worst_of_training, own_layers, zero, str(tmp_path), ranks=ranks
    )
    for rank, (loss, norm, weights, answers) in enumerate(found):
        assert [loss, norm, weights] == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
        assert answers == [2, 2, rank % 2, rank // 2 * 2, ranks // 2]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("different weights", ["last.weight", "different values", "seed the model alike"]),
        ("sharded again", ["inner.up.weight is marked as a shard already", "'skip'"]),
        ("parallelize", ["inner.up.weight is marked as a shard already"]),
        ("clipped", ["inner.up.weight is marked as a shard, as by a LinearLayer of DeepSpeed"]),
        ("full state", ["inner.up.weight is marked as a shard, as by a LinearLayer of DeepSpeed"]),
    ],
)
def test_what_would_go_wrong_is_refused_on_every_rank(
    pool: Pool, kind: str, words: list[str]
) -> None:
    text = same_error(pool.run(skipped_model_ranks.refused, kind))
    assert text.startswith("ValueError: ")
    assert [word for word in words if word not in text] == []


def test_a_star_of_a_plan_stands_for_several_parts_of_a_name(pool: Pool) -> None:
    for worst, shape in pool.run(skipped_model_ranks.worst_of_planned):
        assert worst < 1e-6 and shape == [20, 16]


def test_a_rank_outside_of_the_recorded_group_fails_with_all_others(pool: Pool) -> None:
    text = same_error(pool.run(skipped_model_ranks.outside_of_group))
    assert "on rank 1 of 2" in text and "this rank is not in the group" in text
