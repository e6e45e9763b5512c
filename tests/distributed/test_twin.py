# SPDX-License-Identifier: Apache-2.0
"""A small model stands for a large one in the self-check, where the two have one form."""

import pytest
import torch

from tests.distributed import twin_ranks
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool


@pytest.mark.parametrize("kind", ["as it was made", "checkpointed", "other loss"])
def test_a_twin_stands_for_a_model(pool: Pool, kind: str) -> None:
    for sizes, size in pool.run(twin_ranks.sizes_checked, "auto", kind):
        assert len(sizes) == 1 and sizes[0] < size / 4


@pytest.mark.parametrize("self_check", [True, False])
def test_the_model_itself_is_checked_or_nothing_when_asked(pool: Pool, self_check: bool) -> None:
    for sizes, size in pool.run(twin_ranks.sizes_checked, self_check, "as it was made"):
        assert sizes == ([size] if self_check else [])


@pytest.mark.parametrize(
    "kind", ["hooked", "other class", "other forward", "other sizes", "more layers", "adapter"]
)
def test_a_model_that_was_changed_is_checked_itself(pool: Pool, kind: str) -> None:
    for sizes, size in pool.run(twin_ranks.sizes_checked, "auto", kind):
        assert sizes == [size]


def test_a_model_without_weights_has_a_twin(pool: Pool) -> None:
    for sizes, apart in pool.run(twin_ranks.meta_model, "auto"):
        assert len(sizes) == 1
        assert apart < 1e-5


def test_tokens_are_sharded_without_weights(pool: Pool) -> None:
    assert max(pool.run(twin_ranks.sharded_tokens_on_meta)) < 1e-5


def test_a_wrong_rule_is_found_without_weights(pool: Pool) -> None:
    text = same_error(pool.run(twin_ranks.wrong_rule_on_meta))
    assert "model.layers.0.self_attn.q_proj (row; rule layer_specs[0]" in text


def test_a_wrong_rule_is_found_in_the_twin_and_leaves_the_model(pool: Pool) -> None:
    text = same_error(pool.run(twin_ranks.refused_under_rules))
    assert "model.layers.0.self_attn.q_proj (row; rule layer_specs[0]" in text
    assert "seen in a small model of the same class" in text
    assert "tensor_parallel.self_check: true checks the model itself" in text


@pytest.mark.parametrize(
    ("kind", "within"), [("differs", "mlp"), ("gradient", "self_attn"), ("fails", "mlp")]
)
def test_what_differs_in_the_twin_is_mended_in_the_model(
    pool: Pool, kind: str, within: str
) -> None:
    for rank, (sizes, apart, warnings, individual) in enumerate(
        pool.run(twin_ranks.fallback, kind)
    ):
        assert len(sizes) == 1
        assert apart < 1e-5
        assert len(warnings) == (1 if rank == 0 else 0)
        for layer in (0, 1):
            assert any(name.startswith(f"model.layers.{layer}.{within}") for name in individual)


def test_rules_with_sizes_are_checked_on_the_model_itself(pool: Pool) -> None:
    for sizes, size in pool.run(twin_ranks.shaped_rules):
        assert sizes == [size]


def test_a_twin_leaves_rng_states_and_default_dtype(pool: Pool) -> None:
    for torch_state, python, numpy, dtype in pool.run(twin_ranks.states_left):
        assert torch_state and python and numpy and dtype is torch.float32


def test_ranks_with_other_twins_check_the_model_itself(pool: Pool) -> None:
    for sizes, size in pool.run(twin_ranks.other_twins):
        assert sizes == [size]


@pytest.mark.parametrize("name", ["1 billion", "8 billion", "70 billion"])
def test_the_twin_of_a_large_model_is_small(pool: Pool, name: str) -> None:
    for cost in pool.run("benchmarks.self_check:measure", name):
        assert cost.parameters > 1e9 and cost.small < 2e7
        assert cost.seconds < 15  # on a machine that does other things, too
