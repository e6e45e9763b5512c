# SPDX-License-Identifier: Apache-2.0
"""Without DeepSpeed an optimizer that forms a number over a tensor may not step shards."""

import pytest

from tests.distributed import optimizer_check_ranks
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool


def test_a_step_of_shards_is_refused_and_others_are_not(pool: Pool) -> None:
    for whole, replicated, other, unsharded in pool.run(optimizer_check_ranks.steps):
        text, moved = whole
        assert text.startswith("ValueError: the optimizer of a sharded model: got Adafactor, which")
        assert not moved
        assert [replicated, other, unsharded] == [("nothing", True)] * 3


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("added", "slope was added to LlamaForCausalLM after it was sharded"),
        ("hook", "model.layers.0.mlp.up_proj.weight has a gradient hook"),
    ],
)
def test_parameters_that_are_given_parts_of_a_gradient_are_refused(
    pool: Pool, how: str, words: str
) -> None:
    found = pool.run(optimizer_check_ranks.parameters_of_own, how)
    text = same_error([text for text, _ in found])
    assert text.startswith("ValueError") and words in text
    assert not any(moved for _, moved in found)


@pytest.mark.parametrize(("kind", "steps"), [("a norm of shards", 1), ("a skipped step", 7)])
def test_ranks_that_drift_apart_are_told(pool: Pool, kind: str, steps: int) -> None:
    found = pool.run(optimizer_check_ranks.drift, kind)
    text = same_error([text for _, text in found])
    assert text.startswith("ValueError: the ranks [0, 1] of the TP group of LlamaForCausalLM took")
    assert "deepspeed_autotp.clip_grad_norm_(model" in text and "GradScaler" in text
    assert [taken for taken, _ in found] == [steps] * 2


@pytest.mark.parametrize("kind", ["our clipping", "torch's clipping"])
def test_ranks_that_clip_together_are_left_alone(pool: Pool, kind: str) -> None:
    assert pool.run(optimizer_check_ranks.drift, kind) == [(16, "nothing")] * 2


def test_the_check_ends_with_the_model(pool: Pool) -> None:
    for before, during, after in pool.run(optimizer_check_ranks.hooks):
        assert (during, after) == (before + 1, before)
