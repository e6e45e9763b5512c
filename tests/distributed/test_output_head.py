# SPDX-License-Identifier: Apache-2.0
"""Training with labels: the loss of one process, and no full logits."""

from typing import Any

import pytest
import torch

from tests.distributed import output_head_ranks
from tests.support import logit_forwards
from tests.support.output_head_models import FAMILIES, VOCABULARY
from tests.support.small_models import tokens
from tests.support.worker_pool import Pool


def right(found: dict[str, Any]) -> bool:
    return found["loss"] < 1e-6 and found["gradients"] < 1e-5


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bert"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_and_gradients_equal_one_process_and_only_the_loss_gathers(
    pool: Pool, family: str, tied: bool, ranks: int
) -> None:
    for found in pool.run(output_head_ranks.against_one_process, family, tied, {}, ranks=ranks):
        assert right(found) and found["kind"] and found["gathers"] and found["caps"], found


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_that_were_read_are_freed(pool: Pool, family: str) -> None:
    assert pool.run(output_head_ranks.left_of_logits, family) == [0, 0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_with_a_loss_of_its_own_gathers_its_logits(pool: Pool, tied: bool) -> None:
    for found in pool.run(output_head_ranks.against_one_process, "bert", tied, {}):
        assert right(found) and not found["kind"], found


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("kind", "lazy"),
    [
        *((kind.__name__, True) for kind in logit_forwards.SHARDED),
        *((kind.__name__, False) for kind in logit_forwards.GATHERED),
    ],
)
@pytest.mark.parametrize("self_check", ["auto", False])
def test_what_a_model_does_between_head_and_loss_is_right(
    pool: Pool, kind: str, lazy: bool, self_check: Any
) -> None:
    for found in pool.run(output_head_ranks.between_head_and_loss, kind, self_check):
        assert right(found) and found["logits"] and found["lazy"] is lazy, found
        assert found["warnings"] == []


def test_a_function_with_its_own_gradient_has_full_logits_or_is_an_error(pool: Pool) -> None:
    said = []
    for found in pool.run(output_head_ranks.between_head_and_loss, "Function", "auto"):
        assert right(found) and found["logits"] and not found["lazy"], found
        said += found["warnings"]
    assert len(said) == 1 and said[0].startswith("the logits are gathered for the loss: the model")
    for kind in ("Function", "CheckpointedLoss"):
        for error in pool.run(output_head_ranks.function_of_logits, kind):
            assert error.startswith("an autograd.Function was given outputs.logits")


@pytest.mark.parametrize(
    "more",
    [
        {"num_items_in_batch": 31},
        {"num_items_in_batch": torch.tensor(31)},
        {"ignore_index": 5, "labels": tokens(0, vocabulary=VOCABULARY)},
        {"shift_labels": tokens(1, vocabulary=VOCABULARY)},
        {"labels": torch.full((4, 12), -100), "num_items_in_batch": 3},
        {"logits_to_keep": 0},
    ],
    ids=["items", "item tensor", "ignored", "shifted", "nothing to learn", "all logits"],
)
def test_the_options_of_the_loss_mean_what_they_mean_in_one_process(
    pool: Pool, more: dict[str, Any]
) -> None:
    for found in pool.run(output_head_ranks.against_one_process, "llama", False, more):
        assert right(found) and found["gathers"], found


def test_labels_may_be_positional_and_outputs_a_tuple(pool: Pool) -> None:
    for found in pool.run(output_head_ranks.positional):
        assert [name for name, value in found.items() if not value] == []


@pytest.mark.parametrize("wanted", [None, True, False])
def test_logits_are_plain_in_evaluation_and_without_labels(pool: Pool, wanted: bool | None) -> None:
    for found in pool.run(output_head_ranks.full_logits, wanted):
        assert [name for name, value in found.items() if not value] == []


def test_logits_can_be_used_in_training(pool: Pool) -> None:
    for loss, gradients, accuracy in pool.run(output_head_ranks.extra_term):
        assert loss < 1e-6 and gradients < 1e-5 and accuracy


def test_a_trained_model_generates(pool: Pool) -> None:
    assert pool.run(output_head_ranks.generated) == [True, True]


def test_hooks_on_the_head_see_full_logits_and_gradients(pool: Pool) -> None:
    for found in pool.run(output_head_ranks.watched):
        assert [name for name, value in found.items() if not value] == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_change_nothing(pool: Pool, reentrant: bool) -> None:
    for loss, gradients in pool.run(output_head_ranks.checkpointed, reentrant):
        assert loss < 1e-6 and gradients < 1e-5


def test_autocast_gives_the_types_of_one_process(pool: Pool) -> None:
    for found in pool.run(output_head_ranks.autocast):
        assert found == {"loss": True, "dtypes": True}


def test_a_compiled_model_has_full_logits(pool: Pool) -> None:
    for loss, gradients, plain in pool.run(output_head_ranks.compiled, timeout=110):
        assert loss < 1e-6 and gradients < 1e-5 and plain


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("zero", "family", "cap"),
    [
        (0, "llama", 0.0),
        (1, "llama", 0.0),
        (2, "llama", 0.0),
        (3, "llama", 0.0),
        (1, "gemma2", 2.0),
        (3, "gemma2", 2.0),
    ],
)
def test_the_engine_gathers_no_full_logits(pool: Pool, zero: int, family: str, cap: float) -> None:
    for found in pool.run(output_head_ranks.through_engine, zero, family, ranks=4, timeout=110):
        assert found["caps"] == [cap] * 3
        assert found["worst"] < 1e-5 and found["gathers"] and found["kind"], found


@pytest.mark.parametrize("zero", [1, 3])
def test_a_term_from_the_logits_trains_through_the_engine(pool: Pool, zero: int) -> None:
    for found in pool.run(output_head_ranks.extra_term_in_engine, zero, timeout=110):
        assert found["worst"] < 1e-5


def test_insisting_says_why_a_model_has_no_such_head(pool: Pool) -> None:
    bert, headless, unsharded = pool.run(output_head_ranks.refused)[0]
    start = "ValueError: tensor_parallel.vocab_parallel_lm_head: got true, but "
    assert headless.startswith(start)
    assert "Headless.get_output_embeddings() names no output head" in headless
    assert "the plan does not shard lm_head along the vocabulary and gather its output" in unsharded
    assert bert.startswith(f"{start}BertForMaskedLM.forward is not known to give its logits to")
    assert pool.run(output_head_ranks.quiet) == [True, True]


@pytest.mark.parametrize("self_check", [True, False])
def test_insisting_is_an_error_where_the_loss_is_of_full_logits(
    pool: Pool, self_check: bool
) -> None:
    for said in pool.run(output_head_ranks.insisting, "Masked", self_check):
        assert "Masked.forward needs all its logits before the loss" in said
        assert said.startswith(
            "ValueError: tensor_parallel.vocab" if self_check else "RuntimeError"
        )
    assert pool.run(output_head_ranks.insisting, "Looked", self_check) == ["", ""]
