# SPDX-License-Identifier: Apache-2.0
"""Encoders, encoders with decoders, images with text, and two models at once."""

from collections.abc import Sequence

import pytest

from tests.integration import encoder_models_ranks
from tests.support.encoder_models import IMAGE_TOKEN
from tests.support.worker_pool import Pool

# What a rank of two may hold, and what is replicated beside tables of token types.
_TRANSLATORS = {
    "t5": 0.51,
    "t5, gated, untied": 0.51,
    "mt5": 0.51,
    "umt5": 0.51,
    "bart": 0.54,
    "mbart": 0.54,
    "pegasus": 0.54,
}
_ENCODERS: dict[str, tuple[float, set[str]]] = {
    "bert, classes": (0.52, {"classifier.weight"}),
    "bert, masked": (0.52, set()),
    "roberta, classes": (0.52, {"classifier.out_proj.weight"}),
    "roberta, masked": (0.52, set()),
    "electra, spans": (0.52, {"qa_outputs.weight"}),
    "albert, masked": (0.52, set()),
    "distilbert, masked": (0.52, set()),
    "deberta-v2, classes": (
        0.53,
        {"deberta.encoder.rel_embeddings.weight", "classifier.weight"},
    ),
    "modernbert, masked": (0.51, set()),
}
# The vision encoder.
_SEEING = {
    "llava": "model.vision_tower",
    "qwen2_vl": "model.visual",
    "gemma3": "model.vision_tower",
}


def _train(
    pool: Pool, name: str, *, ranks: int = 2, parts: Sequence[str] = (), images: bool = False
) -> list[encoder_models_ranks.Trained]:
    found: list[encoder_models_ranks.Trained] = pool.run(
        encoder_models_ranks.train, name, parts, images, ranks=ranks, timeout=110
    )
    for trained in found:
        _check(trained)
    return found


def _check(trained: encoder_models_ranks.Trained) -> None:
    assert trained.apart < 1e-5
    assert trained.weights < 1e-5


def _tables(replicated: frozenset[str]) -> set[str]:
    return {n for n in replicated if "position" in n or "token_type" in n}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", _TRANSLATORS)
def test_encoders_with_decoders_train_as_in_one_process(pool: Pool, name: str) -> None:
    for trained in _train(pool, name):
        assert trained.warnings == ()
        assert trained.share < _TRANSLATORS[name]
        # Cross attention and what T5 adds for distances are sharded with all else.
        assert trained.replicated == {
            n for n in trained.replicated if n.endswith("embed_positions.weight")
        }


@pytest.mark.parametrize(
    ("name", "ranks", "share"), [("t5", 4, 0.27), ("t5", 3, 0.45), ("bart", 4, 0.31)]
)
def test_heads_of_both_attentions_fall_to_more_ranks(
    pool: Pool, name: str, ranks: int, share: float
) -> None:
    for trained in _train(pool, name, ranks=ranks):
        assert trained.warnings == ()
        assert trained.share < share


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", _ENCODERS)
def test_encoders_with_a_head_train_as_in_one_process(pool: Pool, name: str) -> None:
    share, replicated = _ENCODERS[name]
    for trained in _train(pool, name):
        assert trained.warnings == ()
        assert trained.share < share
        assert trained.replicated - _tables(trained.replicated) == replicated


def test_an_encoder_trains_on_four_ranks(pool: Pool) -> None:
    for trained in _train(pool, "bert, masked", ranks=4):
        assert trained.share < 0.36


@pytest.mark.parametrize("name", _SEEING)
def test_of_a_model_with_images_the_text_model_is_sharded(pool: Pool, name: str) -> None:
    sight = _SEEING[name]
    first, *others = _train(pool, name, parts=(sight, "model.language_model"))
    for trained in (first, *others):
        assert trained.shares[sight] == 1
        assert trained.shares["model.language_model"] < 0.54
    assert [text.partition(":")[0] for text in first.warnings] == [f"{sight} stays replicated"]


def test_a_model_that_sees_trains_on_four_ranks(pool: Pool) -> None:
    for trained in _train(pool, "llava", ranks=4, parts=("model.language_model",)):
        assert trained.shares["model.language_model"] < 0.36


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_vision_encoder_is_sharded_where_the_self_check_is_given_images(
    pool: Pool, name: str
) -> None:
    for trained in _train(pool, name, parts=("model.vision_tower.encoder",), images=True):
        assert trained.warnings == ()
        assert trained.shares["model.vision_tower.encoder"] < 0.56


@pytest.mark.parametrize("name", ["t5", "bert, masked", "llava"])
def test_an_engine_trains_other_kinds_as_one_process_does(pool: Pool, name: str) -> None:
    for trained in pool.run(encoder_models_ranks.train_engine, name, timeout=110):
        _check(trained)
        assert trained.share < 0.63


@pytest.mark.parametrize("shared", [False, True])
def test_two_models_train_in_turn_over_one_group_or_two(pool: Pool, shared: bool) -> None:
    for found in pool.run(
        encoder_models_ranks.train_in_turn, "bart", "bert, masked", shared, timeout=110
    ):
        for trained in found:
            _check(trained)
            assert trained.share < 0.57


def test_two_engines_train_in_turn(pool: Pool) -> None:
    for found in pool.run(encoder_models_ranks.engines_in_turn, "t5", "llava", timeout=110):
        for trained in found:
            _check(trained)
            assert trained.share < 0.63


def test_parts_and_places_of_other_senses_are_known(pool: Pool) -> None:
    [(parts, tokens)] = pool.run(encoder_models_ranks.seen_of, "llava", ranks=1)
    assert parts == ["model.vision_tower"]
    assert tokens == {IMAGE_TOKEN - 1}
    [(parts, tokens)] = pool.run(encoder_models_ranks.seen_of, "bart", ranks=1)
    assert parts == [] and len(tokens) > 1
