# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism under torch.compile: its collectives are in the graphs."""

from typing import Any

import pytest

from tests.distributed import sequence_compile_ranks
from tests.distributed.sequence_compile_ranks import BY_THREE, Found
from tests.support.engine_config import Setting
from tests.support.worker_pool import Pool


def _equals_one_process(found: Found) -> bool:
    return max(found.apart.values()) < 1e-13


@pytest.mark.parametrize(
    ("layers", "changes", "ranks"),
    [
        (1, {}, 2),
        pytest.param(3, {"tied": True}, 2, marks=pytest.mark.long),
        pytest.param(2, BY_THREE, 3, marks=pytest.mark.long),
    ],
)
def test_one_graph_whose_collectives_are_fused_with_the_products_beside(
    pool: Pool, layers: int, changes: dict[str, Any], ranks: int
) -> None:
    job, blocks = (sequence_compile_ranks.fused, layers, [12, 12], changes), 2 * layers
    for found in pool.run(*job, ranks=ranks, timeout=110):
        assert _equals_one_process(found)
        assert found.graphs == 1 and found.breaks == 0
        # Gathered are the blocks' inputs, the last layer's output, and the logits; scattered is
        # what each block gives.
        assert (found.forward["gathers"], found.forward["scatters"]) == (blocks + 2, blocks)
        assert found.forward["fused_all_gather_matmul"] == blocks
        assert found.forward["fused_matmul_reduce_scatter"] == blocks
        # The gradients of what each block gives, and that of the first layer's input; scattered
        # are those of the blocks' inputs, each of which is a sum of products.
        assert (found.backward["gathers"], found.backward["scatters"]) == (blocks + 1, blocks)
        assert found.backward["fused_all_gather_matmul"] == blocks
        # What the embedding gives, and the gradients of what the head is given and of the norms
        # before the blocks.
        assert (found.forward["all_reduce"], found.backward["all_reduce"]) == (1, blocks + 1)


@pytest.mark.long
def test_tokens_need_not_divide_by_the_tp_size(pool: Pool) -> None:
    job = (sequence_compile_ranks.fused, 2, [13, 7, 12], BY_THREE)
    for found in pool.run(*job, ranks=3, timeout=110):
        assert _equals_one_process(found)
        assert found.breaks == 0
        assert (found.forward["gathers"], found.forward["scatters"]) == (6, 4)


@pytest.mark.parametrize(
    ("layers", "blocks", "checkpoints", "ranks"),
    [
        (1, [], "", 2),
        (2, [], "uncompiled", 2),
        pytest.param(2, [], "", 2, marks=pytest.mark.long),
        pytest.param(2, [], "traced", 2, marks=pytest.mark.long),
        # Four heads for three ranks: layers that may drop out run uncompiled.
        pytest.param(2, [], "", 3, marks=pytest.mark.long),
        pytest.param(3, [0, 1, 2], "", 2, marks=pytest.mark.long),
        pytest.param(3, [0, 2], "", 2, marks=pytest.mark.long),
        pytest.param(3, [1], "", 2, marks=pytest.mark.long),
    ],
)
def test_models_and_blocks_train_and_evaluate_as_one_process(
    pool: Pool, layers: int, blocks: list[int], checkpoints: str, ranks: int
) -> None:
    job = (sequence_compile_ranks.handmade, layers, blocks, checkpoints)
    for found in pool.run(*job, ranks=ranks, timeout=110):
        assert _equals_one_process(found)
        is_compiled = checkpoints != "uncompiled" and ranks == 2
        assert (found.graphs > 0 and found.breaks == 0) or not is_compiled


@pytest.mark.long
def test_a_compiled_model_gives_full_hidden_states(pool: Pool) -> None:
    for found in pool.run(sequence_compile_ranks.hidden_states, timeout=110):
        assert _equals_one_process(found)
        assert found.graphs == 1 and found.breaks == 0


@pytest.mark.long
def test_a_mixture_of_experts_is_one_graph(pool: Pool) -> None:
    for far, graphs, breaks in pool.run(sequence_compile_ranks.experts, timeout=110):
        assert far < 1e-5
        assert (graphs, breaks) == (1, 0)


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("zero", [1, 3])
def test_an_engine_compiles(pool: Pool, zero: int) -> None:
    setting = Setting(tp=2, zero=zero, clip=0.0, sequence=True)
    for far in pool.run(sequence_compile_ranks.engine, setting, ranks=2, timeout=300):
        assert far < 1e-5


def test_what_would_have_other_gradients_is_refused(pool: Pool) -> None:
    said, other = pool.run(sequence_compile_ranks.refused, timeout=110)
    assert said.keys() == other.keys()
    assert said["writes, not compiled"] == other["writes, not compiled"] == "nothing"
    for each in (said, other):
        assert "is a view and is being modified inplace" in each["writes"]
        assert each["outside"].startswith("RuntimeError: blocks.0 was called with gradients, but")
        assert each["outside"].endswith("and compile afterwards")
