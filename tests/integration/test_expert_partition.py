# SPDX-License-Identifier: Apache-2.0
"""Experts of which each rank has some, whole: as in one process, and as shards of each."""

from pathlib import Path
from typing import Any

import pytest

from tests.integration import expert_partition_ranks as ranks
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool

# Of models whose experts transformers runs in one way.
NO_IMPLEMENTATIONS = ("llama4_text",)
NAMES = (
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "qwen2_moe",
    "olmoe",
    *NO_IMPLEMENTATIONS,
)


@pytest.mark.sample(12)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zero", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_whole_experts_train_as_in_one_process(
    pool: Pool, name: str, zero: int | None, size: int
) -> None:
    for rank, trained in enumerate(_trained(pool, name, zero, ranks.WHOLE, size)):
        kind = "whole expert blocks" if name in NO_IMPLEMENTATIONS else "whole experts"
        assert kind in trained["kinds"]
        assert set(trained["first"]) == {4 // size + (rank < 4 % size)}


@pytest.mark.sample(13)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("size", [2, 4])
def test_shards_of_every_expert_train_as_in_one_process(
    pool: Pool, name: str, zero: int, size: int
) -> None:
    for trained in _trained(pool, name, zero, {}, size):
        assert "experts" in trained["kinds"] and set(trained["first"]) == {4}


def test_auto_is_taken_by_an_engine(pool: Pool) -> None:
    for trained in _trained(pool, "mixtral", 1, {"expert_partition": "auto"}, 2):
        assert "experts" in trained["kinds"]  # 2 of 4 on a rank are too few


def _trained(
    pool: Pool, name: str, zero: int | None, section: dict[str, Any], size: int
) -> list[dict[str, Any]]:
    implementation = None if name in NO_IMPLEMENTATIONS else "grouped_mm"
    arguments = (name, zero, section, implementation)
    found = pool.run(ranks.train, *arguments, ranks=size, timeout=110)
    for trained in found:
        assert trained["losses"] < 1e-5 and trained["weights"] < 1e-4, trained
    return found


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_every_implementation_runs_them(pool: Pool, implementation: str) -> None:
    for trained in pool.run(ranks.train, "gpt_oss", None, ranks.WHOLE, implementation):
        assert trained["losses"] < 1e-5 and trained["weights"] < 1e-4, trained


def test_experts_whose_forward_takes_a_routing_are_known_by_it(pool: Pool) -> None:
    for trained in pool.run(ranks.train, "step3p7", 1, ranks.WHOLE, None):
        assert trained["losses"] < 1e-5 and trained["weights"] < 1e-4, trained
        assert "whole experts" in trained["kinds"]


def test_a_rank_whose_experts_no_token_names_trains_on(pool: Pool) -> None:
    assert all(found < 1e-5 for found in pool.run(ranks.train_crowded))
    assert all(found < 1e-2 for found in pool.run(ranks.overflow))
    assert pool.run(ranks.without_tokens) == [[(0, 64), (0, 64)]] * 2


@pytest.mark.parametrize("name", ["mixtral", "llama4_text"])
def test_sequence_parallelism_gives_experts_all_tokens(pool: Pool, name: str) -> None:
    _trained(pool, name, 1, ranks.WHOLE | {"sequence_parallel": True}, 2)


@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("llama4", marks=pytest.mark.long)])
def test_each_rank_reads_its_experts_alone(pool: Pool, tmp_path: Path, name: str) -> None:
    folder, out = str(tmp_path / "full"), str(tmp_path / "saved")
    pool.run(ranks.write, name, folder, ranks=1)
    assert pool.run(ranks.load_and_save, folder, out, ranks=3) == [[]] * 3


def test_what_cannot_be_whole_is_refused_by_name(pool: Pool) -> None:
    start = "ValueError: tensor_parallel.expert_partition: got 'experts', but "
    cases = {
        "'model.layers.0.mlp.experts' (LongcatFlashExperts) is not known to be given "
        "tokens, indices of experts and weights": "longcat_flash",
        "no module of the model holds experts that are sharded": "olmo2",
    }
    found = pool.run(ranks.refused, cases)
    for words in cases:
        text = same_error([each[words] for each in found])
        assert text.startswith(start + words), text
