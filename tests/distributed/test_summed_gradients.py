# SPDX-License-Identifier: Apache-2.0
"""A gradient of which each rank computes a part is summed where the model uses the parameter, and
what else a loss takes it for counts once."""

from typing import Any

import pytest
import torch

from tests.distributed import summed_gradients_ranks
from tests.support.worker_pool import Pool

ONE_KEY_HEAD = {"num_key_value_heads": 1, "attention_bias": True}
TOKENS = {"sequence_parallel": True}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "q/k norms": ("qwen3", {}, {}, 2),
    "one key head": ("llama", ONE_KEY_HEAD, {"tp_overlap_comm": True}, 2),
    "two holders of a key head": ("qwen3", {**ONE_KEY_HEAD, "num_key_value_heads": 2}, TOKENS, 4),
    "token shards": ("llama", {"attention_bias": True, "mlp_bias": True}, TOKENS, 3),
}
LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("case", "way"),
    [
        pytest.param(case, way, marks=[] if way == "added" or case == "q/k norms" else LONG)
        for case in CASES
        for way in ("added", "apart", "checkpointed", "by_copies")
    ],
)
def test_a_penalty_on_all_weights_counts_once(pool: Pool, case: str, way: str) -> None:
    _check(pool, way, *CASES[case])


@pytest.mark.parametrize(
    "way",
    [
        *("of_the_backbone", "read_by_others", "read_by_others_in_the_backbone"),
        *("replaced_forward", "hooked_by_accelerate", "of_a_copy", "compiled", "unfrozen"),
    ],
)
def test_and_the_model_is_used_in_any_way(pool: Pool, way: str) -> None:
    _check(pool, way, "qwen3", {"num_key_value_heads": 1}, {}, 2)


@pytest.mark.long
def test_compiled_ranks_may_share_heads_with_some_of_the_others(pool: Pool) -> None:
    _check(pool, "compiled", "llama", {"num_key_value_heads": 2}, {}, 3)


def _check(
    pool: Pool, way: str, family: str, changes: dict[str, Any], options: dict[str, Any], ranks: int
) -> None:
    job = (summed_gradients_ranks.gradients, way, family, changes, options)
    for found in pool.run(*job, ranks=ranks, timeout=110):
        # The norms of these families compute in float32.
        assert {name: d for name, d in found.items() if not d < 1e-6} == {}


def test_a_penalty_can_be_differentiated_twice(pool: Pool) -> None:
    for second, expected in pool.run(summed_gradients_ranks.second_derivatives):
        assert torch.allclose(second, expected)


def test_a_parameter_that_its_module_has_no_more_is_an_error(pool: Pool) -> None:
    for text in pool.run(summed_gradients_ranks.parametrized):
        assert text.startswith("RuntimeError: weight of ")
        assert "torch.nn.utils.parametrize" in text
