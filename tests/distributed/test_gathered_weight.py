# SPDX-License-Identifier: Apache-2.0
"""A loss that multiplies by the output head's weight itself trains as in one process."""

import pytest

from tests.distributed import gathered_weight_ranks
from tests.support.worker_pool import Pool


@pytest.mark.sample(3)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("forward", ["fused", "plain", "checkpoint", "reentrant"])
def test_loss_and_gradients_equal_one_process(
    pool: Pool, forward: str, tied: bool, bias: bool, ranks: int
) -> None:
    for loss, gradients in pool.run(
        gathered_weight_ranks.against_one_process, forward, tied, bias, ranks=ranks
    ):
        assert loss < 1e-6 and gradients < 1e-5


def test_what_a_weight_says_of_itself_costs_nothing(pool: Pool) -> None:
    for found in pool.run(gathered_weight_ranks.asked):
        # The head gathers its logits; nothing else is gathered.
        assert found == {"gathers": 1, "full": True, "shard": True, "printed": True}


def test_a_weight_is_gathered_once_however_often_it_is_read(pool: Pool) -> None:
    # Besides the weight, in the forward of a checkpoint, nothing is gathered.
    assert pool.run(gathered_weight_ranks.gathers_of_a_step) == [1, 1]


def test_a_kernel_is_given_the_address_of_the_full_weight(pool: Pool) -> None:
    assert pool.run(gathered_weight_ranks.address) == [True, True]


@pytest.mark.parametrize("kind", ["interrupt", "exit"])
def test_a_forward_that_was_interrupted_is_left(pool: Pool, kind: str) -> None:
    for found in pool.run(gathered_weight_ranks.interrupted, kind):
        assert all(found.values()), found


def test_the_shard_is_read_until_the_context_ends(pool: Pool) -> None:
    for found in pool.run(gathered_weight_ranks.read_after_a_forward):
        assert found == [[True, True]]


def test_what_cannot_be_gathered_is_an_error_and_not_the_shard(pool: Pool) -> None:
    for broken, gone in pool.run(gathered_weight_ranks.peculiar):
        assert broken.startswith("RuntimeError: weight of ") and "cannot be gathered" in broken
        assert gone.startswith("AttributeError") and gone.endswith("has no attribute 'weight'")


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_trls_fused_head_takes_the_shard(pool: Pool, family: str, tied: bool) -> None:
    for found in pool.run(gathered_weight_ranks.trl_head, family, tied):
        assert found["loss"] < 1e-6 and found["gradients"] < 1e-5, found
        assert found["top1"] and found["entropy"] < 1e-5
        # The first call compares the batches; then seven numbers a token.
        hashes, *others = found["gathers"]
        assert hashes == 32 and others[0] % 8 == 0  # of the batch, and of the shards
        assert others[1:] == [7 * 4 * found["tokens"]]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_zero_stage_trains_alike(pool: Pool, zero: int) -> None:
    assert max(pool.run(gathered_weight_ranks.with_engine, zero)) < 1e-5


def test_a_compiled_model_gathers_the_weight_within_its_graph(pool: Pool) -> None:
    for loss, gradients, breaks in pool.run(gathered_weight_ranks.compiled, timeout=110):
        assert loss < 1e-6 and gradients < 1e-5 and breaks == 0


def test_writing_to_a_full_weight_is_an_error(pool: Pool) -> None:
    for said in pool.run(gathered_weight_ranks.written):
        assert all("was written to in the forward" in each for each in said), said
