# SPDX-License-Identifier: Apache-2.0
"""Models without a plan of their own are sharded by the names of their layers, and train right."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.integration import families_ranks
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool

_TRIED = [
    "gpt2",
    "gpt_neo",
    "gptj",
    "opt",
    "bloom",
    "mpt",
    "falcon",
    "gpt_bigcode",
    "stablelm",
    "persimmon",
    "bert",
    "bart",
    "biogpt",
    "xglm",
    "ctrl",
    "cpmant",
    "gpt_neox_japanese",
    "openai-gpt",
    "xlm",
    "moshi",
    "modernbert-decoder",
    "whisper",
]
# The model type, and what its shrunken configuration is changed by.
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in _TRIED},
    "codegen, eight heads": ("codegen", {"n_head": 8, "n_embd": 128}),
    "falcon, a key for each head": (
        "falcon",
        {"multi_query": False, "new_decoder_architecture": False, "num_kv_heads": 4},
    ),
    "falcon, grouped": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "falcon, alibi": ("falcon", {"alibi": True, "multi_query": False, "num_kv_heads": 4}),
    "gpt_bigcode, a key for each head": ("gpt_bigcode", {"multi_query": False}),
}


def _groups(size: int) -> list[list[str]]:
    names = sorted(MODELS)
    return [names[start : start + size] for start in range(0, len(names), size)]


def test_every_row_of_the_table_trains_as_in_one_process(pool: Pool) -> None:
    for found in pool.run(families_ranks.every_row, timeout=110):
        assert len(found) > 40
        for row, outcome in found.items():
            assert outcome.apart < 1e-5, row
            assert outcome.share < 0.6, (row, outcome.warnings)
            assert outcome.sources == {"heuristic"}, row


def _check(pool: Pool, names: Sequence[str], *, ranks: int, share: float) -> None:
    wanted = {name: MODELS[name] for name in names}
    for found in pool.run(families_ranks.library_models, wanted, ranks=ranks, timeout=110):
        for name, outcome in found.items():
            assert outcome.apart < 1e-5, name
            assert outcome.sources == {"family", "default"}, name
            assert outcome.share < share, (name, outcome.warnings)
            assert outcome.warnings == (), name


@pytest.mark.parametrize("names", _groups(7), ids=lambda names: names[0])
def test_models_without_a_plan_train_as_in_one_process(pool: Pool, names: list[str]) -> None:
    _check(pool, names, ranks=2, share=0.6)


def test_models_without_a_plan_train_on_four_ranks(pool: Pool) -> None:
    names = ("gpt2", "bert", "bloom", "falcon", "gpt_bigcode", "stablelm")
    _check(pool, names, ranks=4, share=0.36)


def test_a_wrong_guess_is_found_and_not_followed(pool: Pool) -> None:
    for rank, outcome in enumerate(pool.run(families_ranks.wrong_guess)):
        assert outcome.apart < 1e-5
        assert [text.partition(": ")[0] for text in outcome.warnings] == [
            "blocks.*.qkv_proj, blocks.*.out_proj is sharded layer by layer, with full activations "
            "between the layers"
        ] * (rank == 0)


def test_a_guess_that_never_ran_is_not_followed(pool: Pool) -> None:
    for rank, outcome in enumerate(pool.run(families_ranks.never_ran)):
        assert outcome.apart < 1e-5
        assert list(outcome.warnings) == [
            "blocks.*.wi, blocks.*.wo is sharded layer by layer, with full activations between the "
            "layers: no input of the self-check reached it"
        ] * (rank == 0)


def test_a_large_layer_of_no_pair_is_sharded_individually_where_it_can_be(pool: Pool) -> None:
    for outcome, kinds in pool.run(families_ranks.individually_sharded):
        assert outcome.apart < 1e-5
        assert outcome.warnings == ()
        assert {name: kind for name, kind in kinds.items() if kind != "replicated"} == {
            "plain.weight": "column",
            "plain.bias": "column",
        }


def test_a_guess_that_cannot_be_tried_is_refused(pool: Pool) -> None:
    text = same_error(pool.run(families_ranks.without_inputs, ("fc2", ("fc1",), False)))
    assert "without a self-check" in text and "example_inputs" in text


def test_names_that_nobody_knows_are_refused_with_an_example_without_a_self_check(
    pool: Pool,
) -> None:
    text = same_error(pool.run(families_ranks.without_inputs, ("take", ("give",), False)))
    assert "Stack has no tensor-parallel plan of its own" in text
    assert "without a self-check large ones are not sharded individually" in text
    assert "llama, bloom" in text and '"partition_type": "column"' in text
