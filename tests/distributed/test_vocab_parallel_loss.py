# SPDX-License-Identifier: Apache-2.0
"""vocab_parallel_cross_entropy is F.cross_entropy of all logits."""

from typing import Any

import pytest

from tests.distributed import vocab_parallel_loss_ranks
from tests.support.worker_pool import Pool


@pytest.mark.sample(3)
@pytest.mark.parametrize("widths", [None, [5, 9], [14, 0]])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 3}, {"soft_cap": 1.5}],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_it_has_the_value_and_gradient_of_one_process(
    pool: Pool, widths: list[int] | None, options: dict[str, Any], overwrite: bool
) -> None:
    for found in pool.run(
        vocab_parallel_loss_ranks.against_one_process, widths, options, overwrite
    ):
        assert found["value"] < 1e-12 and found["gradient"] < 1e-12 and found["shape"], found
        assert found["kept"] or overwrite


def test_a_model_with_a_sharded_head_trains_as_in_one_process(pool: Pool) -> None:
    for worst, apart in pool.run(vocab_parallel_loss_ranks.own_model):
        assert worst < 1e-5 and apart < 1e-5


def test_what_does_not_fit_is_refused(pool: Pool) -> None:
    expected = [
        "logits and labels: got shapes [2, 3] and [1], expected [..., columns] and [...]",
        "logits and labels: got torch.float32 and torch.int32, expected a floating dtype and "
        "torch.int64",
        "logits and labels: got torch.int64 and torch.int64, expected a floating dtype and "
        "torch.int64",
        "reduction: got 'average', expected one of none, mean, sum",
    ]
    for found in pool.run(vocab_parallel_loss_ranks.refused):
        assert found[:4] == expected
        assert found[4].startswith("widths: got [3] and logits with 3 columns on rank")
        assert found[5].startswith("widths: got [2, 2] and logits with 3 columns on rank")
        assert found[6].startswith("labels: got 6, expected 0 to 5")
        assert found[7].startswith("group: got NoneType, expected a process group")
