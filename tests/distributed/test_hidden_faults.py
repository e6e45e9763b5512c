# SPDX-License-Identifier: Apache-2.0
"""What differs between layers, hides behind a zero, or is changed after sharding is found."""

import pytest

from tests.distributed import hidden_faults_ranks
from tests.distributed.hidden_faults_ranks import DRAWS
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool


@pytest.mark.parametrize(
    ("hides", "inside"),
    [
        ("", (False, True, False)),
        ("projection", (True, True)),
        ("gate", (True, True)),
        ("scale", (True, True)),
    ],
)
def test_a_sum_that_is_missing_in_one_layer_or_behind_a_zero_is_found(
    pool: Pool, hides: str, inside: tuple[bool, ...]
) -> None:
    first, second = pool.run(hidden_faults_ranks.hidden, hides, inside)
    for apart, differing, _ in (first, second):
        assert apart < 1e-5 and differing == "all equal"
    assert (first[2], second[2]) == (1, 0)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_wrong_rule_for_one_layer_is_refused(pool: Pool, layer: int) -> None:
    text = same_error(pool.run(hidden_faults_ranks.rule_for_one_layer, layer))
    assert f"the gradient of model.layers.{layer}.self_attn.k_norm.weight (skip; rule" in text


@pytest.mark.parametrize("change", ["column", "row", "dropout alone"])
@pytest.mark.parametrize("heads", [4, 5])
def test_regions_do_not_depend_on_the_mode_of_a_layer(pool: Pool, heads: int, change: str) -> None:
    assert pool.run(hidden_faults_ranks.modes, heads, change) == [("all equal", True)] * 2


@pytest.mark.parametrize("draw", list(DRAWS))
def test_masks_that_a_model_draws_itself_are_equal_on_all_ranks(pool: Pool, draw: str) -> None:
    first, second = pool.run(hidden_faults_ranks.drawn, draw)
    assert (first, second) == (("all equal", 1), ("all equal", 0))


def test_parts_that_were_copied_or_replaced_are_not_trained(pool: Pool) -> None:
    for found in pool.run(hidden_faults_ranks.replaced):
        assert (
            "was copied, and is trained" in found["layer"] and "Qwen3ForCausalLM" in found["body"]
        )
        assert found["body without gradients"] == found["whole"] == "nothing"
        assert "was replaced after the model was sharded" in found["assigned"]
        assert "exchange modules before" in found["wrapped"]


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_model_that_calls_itself_has_full_logits_within(pool: Pool, family: str) -> None:
    for apart, same in pool.run(hidden_faults_ranks.called_within, family):
        assert apart < 1e-6 and same
