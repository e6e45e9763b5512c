# SPDX-License-Identifier: Apache-2.0
"""torch.compile: the same losses, one graph, and the collectives in it."""

from typing import Any

import pytest

from tests.distributed import compile_ranks
from tests.support.worker_pool import Pool


@pytest.mark.parametrize(
    ("family", "layers", "changes"),
    [
        ("llama", 2, {}),
        pytest.param("qwen3", 2, {}, marks=pytest.mark.long),
        pytest.param("gemma2", 2, {}, marks=pytest.mark.long),
        ("llama", 1, {"num_key_value_heads": 1}),
    ],
)
def test_a_compiled_model_trains_in_one_graph(
    pool: Pool, family: str, layers: int, changes: dict[str, Any]
) -> None:
    changes = {**changes, "num_hidden_layers": layers}
    for found in pool.run(compile_ranks.train, family, changes, timeout=110):
        assert found["apart"] < 1e-5
        assert found["breaks"] == {} and found["graphs"] == 1
        # Attention and MLP of a layer each sum once; embedding and head, which is gathered.
        assert found["forward"]["all_reduce"] == 2 * layers + 1
        assert found["forward"]["all_gather_into_tensor"] == 1
        # The gradients of inputs, and of the weights of heads that both ranks have.
        shared = 2 * layers if "num_key_value_heads" in changes else 0
        assert found["backward"]["all_reduce"] == 2 * layers + 1 + shared
