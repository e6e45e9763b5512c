# SPDX-License-Identifier: Apache-2.0
"""Full weights for an inference engine, and TRL's generation by one: a stand-in for vLLM records
what arrives."""

import os
from pathlib import Path

import pytest

from tests.integration import vllm_ranks
from tests.support.near import near
from tests.support.trainer_script import Script
from tests.support.trl_loops import save_start
from tests.support.worker_pool import Pool

ALL = bool(os.environ.get("AUTOTP_LOOPS"))


@pytest.mark.parametrize(("zero", "lora"), [(1, True), *([(3, False)] if ALL else [])])
def test_a_server_is_given_full_weights(pool: Pool, zero: int, lora: bool, tmp_path: Path) -> None:
    start = str(tmp_path / "start")
    sharded, plain = (
        Script(
            str(tmp_path / f"tp{tp}"),
            tp=tp,
            zero=zero,
            tied=True,
            pretrained=start,
            more={"use_vllm": True, "vllm_mode": "server"},
        )
        for tp in (2, 1)
    )
    pool.run(save_start, "grpo", plain, start, ranks=1)
    history, received = pool.run(vllm_ranks.server_loop, sharded, lora, ranks=4, timeout=110)[0]
    expected, sent = pool.run(vllm_ranks.server_loop, plain, lora, ranks=2, timeout=110)[0]
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (history, expected)]
    assert losses[0] == near(losses[1], abs=3e-5)
    assert len(received) == len(sent) > 1
    for ours, theirs in zip(received, sent, strict=True):
        assert ours.keys() == theirs.keys()
        worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
        assert worst < 2e-3


def test_engines_in_each_process_get_full_weights_and_give_equal_answers(pool: Pool) -> None:
    got = pool.run(vllm_ranks.colocated)
    assert [apart for apart, _ in got] == [0.0, 0.0]
    assert got[0][1] == got[1][1]


def test_full_parameters_are_gathered_in_buckets(pool: Pool) -> None:
    for names, apart, gathers in pool.run(vllm_ranks.buckets):
        assert names == [[], [], []] and apart == [0.0, 0.0, 0.0]
        assert gathers[0] == 1 < gathers[1] < gathers[2]
