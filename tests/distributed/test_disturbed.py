# SPDX-License-Identifier: Apache-2.0
"""Ranks that fall out of step, fork or are interrupted end with an error, and not with others."""

import pytest

from tests.distributed import disturbed_ranks
from tests.support.worker_pool import Pool

TRANSPORTS = ("gloo", "shared memory")
FAULTS = (
    "",
    "leaves out a batch",
    "has another batch",
    "repeats a forward",
    "leaves out a backward",
)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_out_of_step_is_an_error_on_every_rank(
    pool: Pool, fault: str, transport: str
) -> None:
    for apart, said in pool.run(disturbed_ranks.out_of_step, fault, transport):
        assert apart < 1e-5
        if not fault:
            assert said == "nothing"
            continue
        assert "collective mismatch" in said or "at different calls of it" in said or "Lost" in said


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_fork_of_a_rank_is_refused_and_changes_nothing(pool: Pool, transport: str) -> None:
    for said, losses in pool.run(disturbed_ranks.forked, transport):
        assert "is a fork of process" in said and "in the process that sharded it" in said
        assert losses[0] == losses[1]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_signals_while_ranks_wait_change_nothing(pool: Pool, transport: str) -> None:
    for losses, expected, signals in pool.run(disturbed_ranks.signalled, transport):
        assert losses == expected and signals > 20


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_workers_of_a_data_loader_change_nothing(pool: Pool, transport: str) -> None:
    for losses, expected in pool.run(disturbed_ranks.beside_loader, transport):
        assert losses == expected and len(losses) == 4


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_two_models_train_in_two_threads(pool: Pool, transport: str) -> None:
    for losses, expected in pool.run(disturbed_ranks.threads, transport):
        assert losses == expected


def test_groups_of_an_engine_have_the_timeout_of_the_run(pool: Pool) -> None:
    for world, *made in pool.run(disturbed_ranks.engine_timeouts):
        assert made == [world] * len(made) and made


@pytest.mark.parametrize(
    ("where", "as_before"),
    [("before the commit", True), ("in the commit", False), ("after the commit", False)],
)
def test_an_interrupt_leaves_a_model_as_it_was_or_refused(
    pool: Pool, where: str, as_before: bool
) -> None:
    for unchanged, said in pool.run(disturbed_ranks.interrupted, where):
        assert unchanged == as_before
        if not as_before:
            closed, cut = "the process groups of this sharded model were", "an embedding of 96 rows"
            assert closed in said[0] or cut in said[0]
            assert "is a sharded layer, as after an interrupt" in said[1]
