# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism: between blocks every rank has its shard of the tokens."""

from dataclasses import replace

import pytest

from tests.distributed import sequence_parallel_ranks
from tests.support.engine_config import Setting
from tests.support.loss_curves import train_family
from tests.support.worker_pool import Pool

TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2")


# Thirteen tokens in the only row of a micro-batch are sharded unevenly.
def _odd(*, tp: int, zero: int, clip: float) -> Setting:
    return Setting(tp=tp, zero=zero, clip=clip, sequence=True, accumulate=4, length=13)


# In the suite each family has one of the two settings, in turn.
@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "setting",
    [_odd(tp=2, zero=2, clip=1.0), Setting(tp=4, zero=0, clip=0.0, sequence=True)],
    ids=["tp2", "tp4"],
)
@pytest.mark.parametrize("family", TYPES)
def test_losses_equal_one_process(pool: Pool, family: str, setting: Setting) -> None:
    job = (train_family, family, False, [setting], sequence_parallel_ranks.MORE.get(family))
    for worst in pool.run(*job, ranks=setting.tp):
        assert worst[setting] < 1e-5


def test_losses_equal_one_process_at_every_stage_of_zero(pool: Pool) -> None:
    # Two replicas of two rows each.
    stages = [_odd(tp=2, zero=zero, clip=1.0) for zero in range(4)]
    settings = [replace(setting, accumulate=2) for setting in stages]
    for worst in pool.run(train_family, "qwen3", True, settings, ranks=4):
        assert {s: d for s, d in worst.items() if d > 1e-5} == {}


def test_plain_loops_equal_one_process(pool: Pool) -> None:
    cases = [("llama", None, 1), ("gpt_neox", False, 4), ("qwen3", True, 4), ("mixtral", None, 4)]
    for found in pool.run(sequence_parallel_ranks.plain_loops, cases):
        for case, apart in found.items():
            bound = 1e-6 if case.startswith("mixtral") else 1e-12
            assert {name: far for name, far in apart.items() if far > bound} == {}, case


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_may_have_no_token_and_calls_other_lengths(pool: Pool, ranks: int) -> None:
    for worst in pool.run(sequence_parallel_ranks.few_tokens, ranks=ranks):
        assert max(worst) < 1e-11


def test_a_layer_costs_two_gathers_and_two_scatters_each_way(pool: Pool) -> None:
    for forward, backward in pool.run(sequence_parallel_ranks.collectives_of_a_layer):
        assert forward == {"all-gather": 2, "reduce-scatter": 2}
        assert backward == {
            "all-gather": 2,
            "reduce-scatter": 2,
            "small all-reduce": 2,  # of the gradients of two norms
        }


@pytest.mark.parametrize("ranks", [2, 4])
def test_memory_between_blocks_falls_by_the_tp_size(pool: Pool, ranks: int) -> None:
    for between, total in pool.run(sequence_parallel_ranks.saved_between_blocks, ranks=ranks):
        assert between == pytest.approx(1 / ranks, abs=0.02)
        assert total < 0.85


def test_ranks_drop_other_features_of_their_tokens_and_the_same_of_all(pool: Pool) -> None:
    for own, whole, losses, gradients in pool.run(sequence_parallel_ranks.dropout):
        assert not own
        assert whole
        assert max(losses) < 1e-12
        assert max(gradients) < 1e-12


def test_a_trained_model_generates_and_its_copy_trains_on(pool: Pool) -> None:
    for same, far, apart in pool.run(sequence_parallel_ranks.generates):
        assert same
        assert far < 1e-12
        assert {name: distance for name, distance in apart.items() if distance > 1e-12} == {}


def test_what_cannot_be_is_refused_by_name_on_every_rank(pool: Pool) -> None:
    (said, unchanged), (others, _) = pool.run(sequence_parallel_ranks.refused)
    assert said == others
    assert unchanged
    expected = {
        "mixing": "ValueError: tensor_parallel.sequence_parallel: got true, but with the tokens "
        "sharded between blocks the sharded model differs from the full model: the output of "
        "blocks.1.mlp.down differs",
        "no list": "ValueError: tensor_parallel.sequence_parallel is true, but 'ModuleDict' has "
        "no list of layers with row layers or experts in it",
        "unknown": "ValueError: tensor_parallel.sequence_parallel: got true, which needs a "
        "self-check, but the inputs of Handmade are not known",
        "dropping": "ValueError: tensor_parallel.sequence_parallel: got true, but 'model.decoder' "
        "drops layers in training",
        "alone": "RuntimeError: model.layers.0.mlp was called with gradients, but not by model",
        "skipped": "RuntimeError: the last layer of model did not run",
    }
    assert {name: said[name][: len(text)] for name, text in expected.items()} == expected
