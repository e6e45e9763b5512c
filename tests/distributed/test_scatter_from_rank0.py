# SPDX-License-Identifier: Apache-2.0
"""A model whose weights are on TP rank 0 alone trains like one process, and stays there in full."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import scatter_from_rank0_ranks as jobs
from tests.support.handmade_model import PARTITION
from tests.support.large_differences import large_differences
from tests.support.worker_pool import Pool

LLAMA = "only TP rank 0 has the weights of LlamaForCausalLM"


@pytest.mark.sample(2)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(
    "shape", ["8 heads, 1 key", "12 heads, 3 keys", "uneven vocabulary, tied", "biases"]
)
def test_weights_of_rank_0_train_as_in_one_process(pool: Pool, shape: str, ranks: int) -> None:
    for found, (same, kept, tied) in pool.run(jobs.compare, shape, ranks=ranks):
        assert same and kept and tied == ("tied" in shape)
        assert large_differences(found) == {}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_tp_rank_0_of_each_data_parallel_replica_scatters_its_weights(
    pool: Pool, zero: int
) -> None:
    for worst, kept in pool.run(jobs.train_replicas, zero, ranks=4):
        assert worst < 1e-5 and kept


def test_buffers_flags_and_modes_are_those_of_rank_0(pool: Pool) -> None:
    for found in pool.run(jobs.other_state, ranks=3):
        assert all(found), found


def test_fused_weights_go_by_rules_over_any_ranks(pool: Pool) -> None:
    for said, apart in pool.run(jobs.handmade, PARTITION, ranks=4):
        assert said == "same: True" and apart < 1e-6


def test_a_model_without_rules_is_not_sharded_by_names(pool: Pool) -> None:
    for said, _ in pool.run(jobs.handmade, None, ranks=4):
        assert "without a self-check its layers are not sharded by their names alone" in said
        assert "load the weights on every rank" in said


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_transformers_loads_on_rank_0_is_there_on_all(
    pool: Pool, tied: bool, tmp_path: Path
) -> None:
    for found in pool.run(jobs.load, str(tmp_path), tied, ranks=3):
        assert all(found), found


def test_one_rank_says_that_nothing_was_tried(pool: Pool) -> None:
    (first, *more), others = pool.run(jobs.warned, "auto")
    assert not more and not others
    assert first.startswith("no self-check of the plan for LlamaForCausalLM, since " + LLAMA)
    assert pool.run(jobs.warned, False) == [[], []]


def test_only_rank_0_holds_full_weights_and_frees_each(pool: Pool) -> None:
    (first, *_), *others = found = pool.run(jobs.memory, ranks=4)
    for most, own, largest, _ in others:
        assert own <= most < own + largest // 2
    _, own, largest, counts = found[0]
    assert first < own + 2 * largest
    assert counts == list(range(len(counts), 0, -1)) and len(counts) > 10


@pytest.mark.parametrize(
    ("states", "tp", "words"),
    [
        (["meta", "meta"], 2, "all weights are on the meta device on rank 0, which is TP rank 0"),
        (["meta", ""], 2, "all weights are on the meta device on rank 0, which is TP rank 0"),
        (["", "meta", "", "meta"], 4, "on ranks 1, 3, but not on rank 2: load them on every rank"),
        (["", "meta", "", ""], 2, "on rank 1, but not on rank 3: load them on every rank"),
        (["", "meta", "meta", "meta"], 2, "on rank 2, which is TP rank 0 of a TP group"),
        (["", "partly"], 2, f"on rank 1 of 2: {jobs.PARAMETER} is on the meta device, but model."),
        (["partly", "meta"], 2, f"on rank 0 of 2: {jobs.PARAMETER} is on the meta device"),
        (["", "attribute"], 2, "on rank 1 of 2: model.norm.kept is a tensor on the meta device"),
        (["", "meta", "hook"], 3, f"on rank 2 of 3: {jobs.PARAMETER} has a gradient hook, which"),
        (["", "meta", "subclass"], 3, f"on rank 2 of 3: {jobs.PARAMETER} is a Special on the meta"),
        (["", "meta", "more"], 3, "dropout: missing on ranks 0, 1, but Dropout(p=0.5, inpl"),
        (
            ["", "meta", "reference"],
            3,
            "no memory can be allocated for it, since something else refers to it",
        ),
    ],
)
def test_what_is_neither_here_nor_there_is_refused(
    pool: Pool, states: list[str], tp: int, words: str
) -> None:
    texts = pool.run(jobs.refused, states, tp, {}, {}, ranks=len(states))
    assert len(set(texts)) == 1
    assert texts[0].startswith("ValueError: ") and words in texts[0]


@pytest.mark.parametrize(
    ("states", "words"),
    [
        (
            ["dropout", "more dropout"],
            "dropout: Dropout(p=0.1, inplace=False) on rank 0, but Dropout(",
        ),
        (["", "act"], "hidden_act: 'silu' on rank 0, but 'gelu' on rank 1"),
        (["", "meta act"], "hidden_act: 'silu' on rank 0, but 'gelu' on rank 1"),
    ],
)
def test_models_of_other_settings_are_refused(pool: Pool, states: list[str], words: str) -> None:
    texts = pool.run(jobs.refused, states, 2, {}, {})
    assert len(set(texts)) == 1
    assert words in texts[0] and "differs between the ranks" in texts[0]


@pytest.mark.parametrize(
    ("key", "config", "more"),
    [
        ("self_check", {"self_check": True}, {}),
        ("example_inputs", {}, {"example_inputs": {"input_ids": torch.zeros(1, 4).long()}}),
    ],
)
def test_a_self_check_that_was_asked_for_is_refused(
    pool: Pool, key: str, config: dict[str, Any], more: dict[str, Any]
) -> None:
    first, second = pool.run(jobs.refused, ["", "meta"], 2, config, more)
    assert first == second
    assert f"{key} asks for a self-check" in first and LLAMA in first


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 3])
def test_a_rank_that_fails_on_the_way_ends_the_others(pool: Pool, failing: int, after: int) -> None:
    texts = pool.run(jobs.fails_on_the_way, failing, after, ranks=3, timeout=30.0)
    assert len(set(texts)) == 1
    assert texts[0].startswith(f"on rank {failing} of 3: RuntimeError: scattering the weights")
    assert "no rank has a model now: no more" in texts[0]
