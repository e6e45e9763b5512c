# SPDX-License-Identifier: Apache-2.0
"""Options of TRL's trainers, its experimental trainers, and their second models: with install() a
run at TP 2 is that without TP.

``make loops`` runs all.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.integration.trl_options_ranks import (
    other_tp_size,
    reward_curve,
    run_options,
    save_models,
)
from tests.support.near import near
from tests.support.trainer_script import Script
from tests.support.worker_pool import Pool

ALL = bool(os.environ.get("AUTOTP_LOOPS"))
FOLLOWS = {"sync_ref_model": True, "ref_model_sync_steps": 1}
# Trainer, ZeRO stage, options, of which "second" names models beside the policy.
Case = tuple[str, int, dict[str, Any]]
SOME: list[Case] = [("dpo", 3, FOLLOWS)]
SFT: list[dict[str, Any]] = [
    {"packing": True, "max_length": 32},
    {"packing": True, "max_length": 32, "packing_strategy": "wrapped"},
    {"padding_free": True, "max_length": None},
    {"loss_type": "dft"},
    {"gradient_checkpointing": True},
]
DPO: list[dict[str, Any]] = [
    FOLLOWS,
    {"second": ["ref_model"]},
    {"padding_free": True},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    *(
        {"loss_type": [name]}
        for name in (
            *("ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
            *("apo_zero", "apo_down", "discopop"),
        )
    ),
    *({"loss_type": [name], "label_smoothing": 0.1} for name in ("exo_pair", "robust")),
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence"},
    {"ld_alpha": 0.5},
    {"use_weighting": True},
]
GRPO: list[dict[str, Any]] = [
    *({"loss_type": name} for name in ("grpo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo")),
    {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    {"scale_rewards": "batch"},
    {"scale_rewards": "none"},
    {"mask_truncated_completions": True, "beta": 0.05},
    {"num_iterations": 2},
    {"steps_per_generation": 2},
    {"beta": 0.1, **FOLLOWS},
    {"top_entropy_quantile": 0.5},
    {"entropy_coef": 0.1, "use_adaptive_entropy": True},
    {"cast_lm_head_to_fp32": True},
    {"off_policy_mask_threshold": 0.5},
    {"gradient_checkpointing": True},
    {"cache_implementation": "static"},
    {"repetition_penalty": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
]
EVERY: list[Case] = [
    *(("sft", 1, options) for options in SFT),
    *(("dpo", 1, options) for options in DPO),
    *(("grpo", 1, options) for options in GRPO),
    ("sft chat", 1, {"assistant_only_loss": True}),
    ("grpo", 3, {"beta": 0.1, **FOLLOWS}),
    ("kto", 1, {"loss_type": "apo_zero_unpaired"}),
    ("kto", 1, FOLLOWS),
    ("reward", 1, {"center_rewards_coefficient": 0.01}),
    ("rloo", 1, {"normalize_advantages": True}),
    ("rloo", 1, {"reward_clip_range": (0.1, 0.5)}),
    ("rloo", 1, FOLLOWS),
    ("distillation", 1, {}),
    ("distillation", 3, {}),
    ("online_dpo", 1, {}),
    ("online_dpo", 1, {"loss_type": "ipo"}),
    ("online_dpo", 3, {"second": ["ref_model"]}),
    ("cpo", 1, {}),
    ("cpo", 1, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    *((kind, 1, {}) for kind in ("orpo", "tpo", "gkd", "iw_opd", "gmpo", "a2po", "sdft", "sdpo")),
    ("sdft", 3, {"teacher_model_kind": "ema"}),
]
_LEFT_OUT = ("runtime", "per_second", "step_time", "total_flos")


def scripts(folder: Path, tp: int, **more: Any) -> tuple[Script, Script]:
    """The run with tensor parallelism, and that without."""
    sharded, plain = (
        Script(str(folder / f"tp{size}"), tp=size, pretrained=str(folder / "start"), **more)
        for size in (tp, 1)
    )
    return sharded, plain


def compared(
    pool: Pool, case: Case, folder: Path, *, ranks: int, tp: int = 2, rewards: str = ""
) -> None:
    kind, zero, options = case
    sharded, plain = scripts(folder, tp, zero=zero, steps=3, more=options)
    pool.run(save_models, plain.pretrained, ranks=1)
    got = pool.run(run_options, kind, sharded, rewards, ranks=ranks, timeout=110)
    expected = pool.run(run_options, kind, plain, rewards, ranks=ranks // tp, timeout=110)
    histories = [
        # Rounding decides which of two equal answers is preferred before the first step.
        [
            {
                key: value
                for key, value in row.items()
                if not key.endswith(_LEFT_OUT) and (key, row["step"]) != ("rewards/accuracies", 1)
            }
            for row in history
        ]
        for history, _ in (got[0], expected[0])
    ]
    assert histories[0] == near(histories[1], abs=3e-5)
    for first in range(tp):
        assert [answers for _, answers in got[first::tp]] == [answers for _, answers in expected]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", [*SOME, *EVERY] if ALL else SOME, ids=str)
def test_an_option_does_what_it_does_without_tensor_parallelism(
    pool: Pool, case: Case, tmp_path: Path
) -> None:
    compared(pool, case, tmp_path, ranks=2)


@pytest.mark.skipif(not ALL, reason="make loops")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["grpo", "rloo", "online_dpo"])
@pytest.mark.parametrize(
    ("rewards", "ranks", "tp"),
    [("sharded", 4, 2), ("full on each rank", 2, 2), ("other size", 4, 4)],
)
def test_a_reward_model_rewards_as_without_tensor_parallelism(
    pool: Pool, kind: str, rewards: str, ranks: int, tp: int, tmp_path: Path
) -> None:
    compared(pool, (kind, 1, {}), tmp_path, ranks=ranks, tp=tp, rewards=rewards)


@pytest.mark.skipif(not ALL, reason="make loops")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_policy_learns_step_by_step_as_without_tensor_parallelism(
    pool: Pool, ranks: int, tmp_path: Path
) -> None:
    options = {
        "per_device_train_batch_size": 32 // ranks,
        "num_generations": 8,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    sharded, plain = scripts(tmp_path, 2, steps=20, more=options)
    pool.run(save_models, plain.pretrained, ranks=1)
    got = pool.run(reward_curve, sharded, ranks=ranks, timeout=180)
    expected = pool.run(reward_curve, plain, ranks=ranks // 2, timeout=180)
    curve = expected[0][0]
    assert len(curve) == 20 and sum(curve[:3]) / 3 < 0.3 and sum(curve[-3:]) / 3 > 0.9
    for first in range(2):
        # Token by token: the rewards are exactly the same.
        assert got[first::2] == expected


@pytest.mark.skipif(not ALL, reason="make loops")
@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (4, 1)])
def test_engines_of_two_tp_sizes_are_refused_on_each_rank(
    pool: Pool, first: int, second: int
) -> None:
    said = pool.run(other_tp_size, first, second, ranks=4)
    assert len(set(said)) == 1
    assert f"autotp_size is {second}" in said[0] and f"groups of {first} ranks" in said[0]
