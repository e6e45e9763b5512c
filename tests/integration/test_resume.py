# SPDX-License-Identifier: Apache-2.0
"""A checkpoint goes on at another TP size and with another number of data-parallel ranks.

The losses after it are those of the run that was saved. ``make resume`` runs the whole matrix.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.engine_config import Setting
from tests.support.loss_curves import worst_difference
from tests.support.resumed_runs import (
    Case,
    convert_to_universal,
    load_and_go_on,
    load_universal_and_go_on,
    save_and_go_on,
    wrong_affine_maps,
)
from tests.support.worker_pool import Pool

STEPS = 3
EVERYTHING = bool(os.environ.get("AUTOTP_RESUME_MATRIX"))

# TP size and ranks of the saved run, and of the one that goes on.
PAIRS = [(2, 4, 4, 4), (4, 4, 2, 2), (2, 2, 3, 3), (2, 4, 1, 2), (1, 2, 2, 4), (2, 2, 2, 4)]
CASES = {
    "tied": Case(),
    "experts": Case(
        "qwen3_moe",
        changes={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "fused": Case("phi3", tied=False),
    "one key head": Case(tied=False, changes={"num_key_value_heads": 1}),
    "biases": Case("qwen2", tied=False, changes={"num_attention_heads": 4}),
}
# Each kind of optimizer, pair and model once; the matrix has them in all combinations.
QUICK = [
    (PAIRS[0], 0, "fp32", "fused"),
    (PAIRS[1], 0, "bf16", "tied"),
    (PAIRS[2], 1, "fp32", "experts"),
    (PAIRS[3], 2, "fp32", "one key head"),
    (PAIRS[4], 1, "fp32", "tied"),
    (PAIRS[5], 2, "bf16", "biases"),
    (PAIRS[2], 2, "fp16", "fused"),
    (PAIRS[0], 3, "fp32", "one key head"),
    (PAIRS[3], 3, "fp32", "fused"),
]
MATRIX = [
    (pair, zero, precision, case)
    for pair in PAIRS
    for zero in (0, 1, 2, 3)
    for precision in ("fp32", "bf16", "fp16")
    if zero or precision != "fp16"  # which needs ZeRO
    for case in CASES
]


def go_on(
    pool: Pool,
    pair: tuple[int, int, int, int],
    zero: int,
    precision: str,
    case: Case,
    folder: Path,
    *,
    steps: int = STEPS,
) -> float:
    """The worst relative difference of the losses after the checkpoint."""
    tp, ranks, new_tp, new_ranks = pair
    saved = Setting(tp=tp, zero=zero, clip=1.0, precision=precision)
    made = Setting(tp=new_tp, zero=zero, clip=1.0, precision=precision)
    expected = pool.run(save_and_go_on, case, saved, str(folder), steps, ranks=ranks)
    got = pool.run(load_and_go_on, case, made, str(folder), steps, ranks=new_ranks)
    return max(worst_difference(losses, expected[0]) for losses in got)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("pair", "zero", "precision", "case"), MATRIX if EVERYTHING else QUICK)
def test_a_run_goes_on_at_another_size(
    pool: Pool,
    pair: tuple[int, int, int, int],
    zero: int,
    precision: str,
    case: str,
    tmp_path: Path,
) -> None:
    steps = 5 if EVERYTHING else STEPS
    worst = go_on(pool, pair, zero, precision, CASES[case], tmp_path, steps=steps)
    # Sums in 16 bits depend on the TP size.
    assert worst < (1e-5 if precision == "fp32" else 2e-2)


SUB_GROUPS = {"zero_optimization": {"stage": 3, "sub_group_size": 9000}}
OTHERS = {
    "gradients in float32": (1, "bf16", Case(config={"data_types": {"grad_accum_dtype": "fp32"}})),
    "frozen weights": (2, "fp32", Case(frozen="layers.0.mlp")),
    "frozen weights, ZeRO 3": (3, "fp32", Case(frozen="layers.0.")),
    "frozen weights, no ZeRO": (0, "fp32", Case(frozen="layers.0.")),
    "momentum": (1, "fp32", Case(momentum=True)),
    "momentum, no ZeRO": (0, "fp32", Case(momentum=True)),
    "sub-groups": (3, "fp32", Case(config=SUB_GROUPS)),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_and_frozen_weights_go_on(pool: Pool, name: str, tmp_path: Path) -> None:
    zero, precision, case = OTHERS[name]
    saved = Setting(tp=2, zero=zero, clip=1.0, precision=precision)
    folder = str(tmp_path)
    expected = pool.run(save_and_go_on, case, saved, folder, STEPS, ranks=4)
    got = pool.run(load_and_go_on, case, replace(saved, tp=4), folder, STEPS, ranks=4)
    worst = max(worst_difference(losses, expected[0]) for losses in got)
    assert worst < (1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("pair", "zero", "case"),
    [
        (PAIRS[0], 1, "one key head"),
        (PAIRS[2], 2, "fused"),
        (PAIRS[3], 3, "experts"),
        (PAIRS[1], 3, "tied"),
    ],
)
def test_deepspeed_converts_a_checkpoint_to_a_universal_one_that_goes_on(
    pool: Pool, pair: tuple[int, int, int, int], zero: int, case: str, tmp_path: Path
) -> None:
    tp, ranks, new_tp, new_ranks = pair
    # Under ZeRO 3 DeepSpeed restores the settings of the first parameter group for all of them.
    chosen = replace(CASES[case], groups=1 if zero == 3 else 2)
    saved = Setting(tp=tp, zero=zero, clip=1.0)
    made = Setting(tp=new_tp, zero=zero, clip=1.0)
    folder = str(tmp_path)
    expected = pool.run(save_and_go_on, chosen, saved, folder, STEPS, ranks=ranks)
    pool.run(convert_to_universal, folder, ranks=1)
    universal = replace(chosen, config={"checkpoint": {"load_universal": True}})
    got = pool.run(load_universal_and_go_on, universal, made, folder, STEPS, ranks=new_ranks)
    assert max(worst_difference(losses, expected[0]) for losses in got) < 1e-5


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_affine_maps_of_deepspeed_take_and_join_the_shards_of_a_plan(
    pool: Pool, ranks: int
) -> None:
    assert pool.run(wrong_affine_maps, ranks, ranks=1) == [[]]
