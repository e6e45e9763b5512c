# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers with install(): they log, generate and save what they do without TP.

``make loops`` runs all combinations.
"""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.near import near
from tests.support.trainer_script import Script
from tests.support.trl_loops import run_loop, save_start, saved_apart
from tests.support.worker_pool import Pool

ALL = bool(os.environ.get("AUTOTP_LOOPS"))
PRECOMPUTED = {"precompute_ref_log_probs": True}
# Half a prompt's answers on each replica.
SPLIT_GROUPS = {"per_device_train_batch_size": 2}
# Kind, ranks at TP 2, ZeRO stage, LoRA, tied, options.
Loop = tuple[str, int, int, bool, bool, dict[str, Any]]
SOME: list[Loop] = [
    ("sft", 2, 3, False, True, {}),
    ("dpo", 4, 1, False, False, PRECOMPUTED),
    ("reward", 4, 1, True, False, {}),
    ("grpo", 4, 2, True, False, SPLIT_GROUPS),
]
EVERY: list[Loop] = [
    ("sft", 4, 2, True, True, {}),
    ("dpo", 2, 3, True, True, PRECOMPUTED),
    ("rloo", 4, 1, False, True, {}),
    *(
        (kind, ranks, zero, lora, False, {})
        for kind, ranks, zero, lora in itertools.product(
            ("sft", "dpo", "grpo", "reward", "kto", "rloo"), (2, 4), (1, 2, 3), (False, True)
        )
    ),
]
# Of one process's speed, and what DeepSpeed's ZeRO 3 hides from transformers.
_LEFT_OUT = ("runtime", "per_second", "step_time", "total_flos")


def reported(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """What has to be as without TP. Before the first step policy and reference model are one, and
    rounding decides which answer they prefer."""
    return [
        {
            key: value
            for key, value in row.items()
            if not key.endswith(_LEFT_OUT) and (key, row["step"]) != ("rewards/accuracies", 1)
        }
        for row in history
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "ranks", "zero", "lora", "tied", "more"), [*SOME, *EVERY] if ALL else SOME
)
def test_a_loop_does_what_it_does_without_tensor_parallelism(
    pool: Pool,
    kind: str,
    ranks: int,
    zero: int,
    lora: bool,
    tied: bool,
    more: dict[str, Any],
    tmp_path: Path,
) -> None:
    sharded, plain = (
        Script(
            str(tmp_path / f"tp{tp}"),
            tp=tp,
            zero=zero,
            tied=tied,
            pretrained=str(tmp_path / "start"),
            more=more,
        )
        for tp in (2, 1)
    )
    pool.run(save_start, kind, plain, plain.pretrained, ranks=1)
    got = pool.run(run_loop, kind, sharded, lora, ranks=ranks, timeout=110)
    expected = pool.run(run_loop, kind, plain, lora, ranks=ranks // 2, timeout=110)
    assert reported(got[0][0]) == near(reported(expected[0][0]), abs=3e-5)
    assert [answers for _, answers in got[::2]] == [answers for _, answers in got[1::2]]
    assert [answers for _, answers in got[::2]] == [answers for _, answers in expected]
    if zero < 3:  # of which DeepSpeed writes no full weights in one process
        assert pool.run(saved_apart, (sharded.out, plain.out), ranks=1)[0] < 1e-3
