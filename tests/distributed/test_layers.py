# SPDX-License-Identifier: Apache-2.0
"""Every sharded layer gives the outputs and gradients of the full one, in float64."""

import pytest
import torch

from tests.distributed import layers_ranks
from tests.support import layer_cases
from tests.support.worker_pool import Pool

RANKS = pytest.mark.parametrize("ranks", [2, 3, 4])


@RANKS
def test_every_layer_equals_one_process(pool: Pool, ranks: int) -> None:
    for found in pool.run(layers_ranks.all_distances, ranks=ranks):
        assert set(found) == set(layer_cases.CASES)
        far = {name: d for name, d in found.items() if not all(v < 1e-12 for v in d.values())}
        assert far == {}


@pytest.mark.parametrize("kind", ["column", "row", "embedding"])
def test_a_subclass_that_reads_its_weight_itself_is_named(pool: Pool, kind: str) -> None:
    for in_self_check, when_run in pool.run(layers_ranks.own_forward, kind):
        name = "OwnForwardEmbedding" if kind == "embedding" else "OwnForward"
        assert in_self_check.startswith("ValueError: ")
        assert when_run.startswith("RuntimeError: ")
        for text in (in_self_check, when_run):
            assert f"{name}.forward does not call super().forward" in text
            assert "partition_type 'skip'" in text


@pytest.mark.parametrize("style", ["embedding_rowwise", "embedding_colwise"])
@pytest.mark.parametrize(
    ("option", "value"), [("max_norm", 1.0), ("scale_grad_by_freq", True), ("sparse", True)]
)
def test_an_embedding_option_that_needs_the_full_weight_is_refused(
    pool: Pool, option: str, value: object, style: str
) -> None:
    for text in pool.run(layers_ranks.option, option, value, style):
        assert text.startswith("ValueError: Embedding(257, 9")
        assert option in text and "leave it replicated" in text


@pytest.mark.parametrize("strange", [257, -1, -100])
def test_an_id_outside_the_vocabulary_is_an_error_on_every_rank(pool: Pool, strange: int) -> None:
    texts = pool.run(layers_ranks.strange_ids, strange, ranks=3)
    expected = f"IndexError: ids: got {strange}, expected 0 to 256, the rows of the embedding over "
    assert len(set(texts)) == 1 and texts[0].startswith(expected)


def test_an_embedding_that_is_resized_once_it_is_sharded_is_refused(pool: Pool) -> None:
    for text in pool.run(layers_ranks.resized):
        assert text.startswith("ValueError: an embedding of 257 rows has 300 on rank ")
        assert "it was resized after the model was sharded" in text


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_a_sharded_vocabulary_keeps_the_bits_of_every_dtype_and_leaves_a_frozen_weight(
    pool: Pool, name: str
) -> None:
    for same, frozen in pool.run(layers_ranks.embedding_of, name):
        assert same == {"output": True, "checkpointed": True, "autocast": True, "gradient": True}
        assert frozen == (False, True)


def test_the_gradient_of_a_sharded_vocabulary_has_no_second_derivative(pool: Pool) -> None:
    for text in pool.run(layers_ranks.twice_of_an_embedding):
        assert text.startswith("RuntimeError: trying to differentiate twice")


@pytest.mark.parametrize("name", ["pair with biases", "gpt-2's linear"])
def test_autocast_gives_the_types_of_one_process(pool: Pool, name: str) -> None:
    for unsharded, sharded, apart in pool.run(layers_ranks.dtypes, name):
        assert sharded == unsharded
        assert unsharded[0] is torch.bfloat16
        assert apart < 2e-2


@pytest.mark.parametrize("name", ["pair with biases", "row that splits its input", "vocabulary"])
def test_layers_run_without_gradients(pool: Pool, name: str) -> None:
    for found in pool.run(layers_ranks.without_gradients, name):
        assert set(found) == {"no_grad", "inference_mode"}
        assert max(found.values()) < 1e-12


@pytest.mark.parametrize(
    "name", ["pair with biases", "gathered column", "row that splits its input"]
)
def test_a_second_derivative_is_an_error(pool: Pool, name: str) -> None:
    for texts in pool.run(layers_ranks.twice, name):
        assert all("trying to differentiate twice" in text for text in texts)


def test_a_second_derivative_of_a_summed_gradient_names_the_parameter(pool: Pool) -> None:
    for text in pool.run(layers_ranks.twice_of_a_sum):
        assert "the gradient of scale " in text and "create_graph" in text


def test_a_sharded_layer_shows_its_own_sizes(pool: Pool) -> None:
    first, second = pool.run(layers_ranks.faces)
    assert (first["column"], second["column"]) == ((10, 8, (8, 10)), (10, 5, (5, 10)))
    assert (first["row"], second["row"]) == ((8, 6, (6, 8)), (5, 6, (6, 5)))
    assert "ColumnLinear(in_features=10, out_features=8" in first["repr"]
