# SPDX-License-Identifier: Apache-2.0
"""The loss of many tokens is formed with the output head, in chunks, and is that of one process."""

from typing import Any

import pytest
import torch

from tests.distributed import fused_loss_ranks
from tests.distributed.fused_loss_ranks import CHUNK
from tests.support.output_head_models import VOCABULARY
from tests.support.small_models import tokens
from tests.support.worker_pool import Pool


def right(found: dict[str, Any]) -> bool:
    return bool(found["loss"] < 1e-6 and found["gradients"] < 1e-6 and found["chunks"])


@pytest.mark.parametrize(
    ("widths", "factors", "cap", "bias"),
    [
        ([4, 5], "", 0.0, True),
        ([9, 0], "scaled", 1.5, False),
        ([3, 4, 2], "divided", 0.0, True),
        ([1, 0, 7], "", 0.5, False),
    ],
)
def test_loss_and_gradients_are_exact_in_float64(
    pool: Pool, widths: list[int], factors: str, cap: float, bias: bool
) -> None:
    ranks = len(widths)
    for found in pool.run(
        fused_loss_ranks.against_cross_entropy, widths, factors, cap, bias, ranks=ranks
    ):
        assert len(found) == 3 + bias
        assert max(found.values()) < 1e-12, found


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_step_is_that_of_one_process(pool: Pool, family: str, tied: bool, ranks: int) -> None:
    run = fused_loss_ranks.against_one_process
    for found in pool.run(run, family, tied, {}, {}, ranks=ranks):
        assert right(found) and found["lazy"], found


@pytest.mark.parametrize(
    "more",
    [
        {"num_items_in_batch": 31},
        {"num_items_in_batch": torch.tensor(31)},
        {"shift_labels": tokens(1, vocabulary=VOCABULARY), "ignore_index": 5},
    ],
    ids=["items", "item tensor", "shifted"],
)
def test_the_options_of_the_loss_mean_what_they_mean_in_one_process(
    pool: Pool, more: dict[str, Any]
) -> None:
    for found in pool.run(fused_loss_ranks.against_one_process, "llama", False, more, {}):
        assert right(found), found


def test_the_self_check_knows_it(pool: Pool) -> None:
    for found in pool.run(fused_loss_ranks.self_checked, "gemma2"):
        assert right(found), found


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_are_formed_where_they_are_read(pool: Pool, family: str) -> None:
    for found in pool.run(fused_loss_ranks.logits_are_read, family):
        late = found.pop("late")
        assert [name for name, value in found.items() if not value] == []
        assert all("before loss.backward(), take what you need" in said for said in late), late


@pytest.mark.sample(2)
@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("reads", [False, True])
def test_micro_batches_accumulate_in_the_engine(pool: Pool, zero: int, reads: bool) -> None:
    for found in pool.run(fused_loss_ranks.accumulated, zero, reads, ranks=4, timeout=110):
        assert found["worst"] < 1e-5 and found["fused"], found


@pytest.mark.parametrize("part", ["head", "rest"])
def test_frozen_weights_have_no_gradient(pool: Pool, part: str) -> None:
    for found in pool.run(fused_loss_ranks.frozen, part):
        assert right(found), found


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_of_the_whole_model_forms_it_twice(pool: Pool, reentrant: bool) -> None:
    for found in pool.run(fused_loss_ranks.checkpointed, reentrant):
        assert right(found), found


@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_16_bits_round_as_much_as_without_chunks(pool: Pool, kind: str) -> None:
    for found in pool.run(fused_loss_ranks.rounded, kind):
        assert (found["fused chunk"], found["not chunk"]) == (CHUNK, 96)
        assert found["fused"] < 1.1 * found["not"], found


@pytest.mark.parametrize("way", ["ddp", "fully_shard", "resharded", "head"])
def test_data_parallel_replicas_average_its_gradients(pool: Pool, way: str) -> None:
    for found in pool.run(fused_loss_ranks.in_parallel, way, ranks=4):
        assert found["worst"] < 1e-5, found
        # A weight that is sharded again behind its layer is not there for the loss.
        assert found["chunk"] == (24 if way == "head" else CHUNK)


@pytest.mark.parametrize(("kind", "seen"), [("float16", [48]), ("few tokens", [48]), ("hook", [])])
def test_other_losses_take_all_logits_at_once(pool: Pool, kind: str, seen: list[int]) -> None:
    assert pool.run(fused_loss_ranks.whole_logits, kind) == [seen, seen]
