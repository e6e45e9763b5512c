# SPDX-License-Identifier: Apache-2.0
"""Parameters read as full tensors within ``gather_params``, and changes are kept where asked."""

from typing import Any

import pytest

from tests.distributed import gather_params_ranks as ranks
from tests.support.engine_config import Setting
from tests.support.worker_pool import Pool


@pytest.mark.parametrize("tp", [2, 3])
def test_parameters_are_full_within_and_changes_are_discarded(pool: Pool, tp: int) -> None:
    for found in pool.run(ranks.reads, ranks=tp):
        assert all(found.values()), found


@pytest.mark.parametrize("tp", [2, 3])
def test_the_values_of_the_modifier_are_sharded(pool: Pool, tp: int) -> None:
    for found in pool.run(ranks.writes, ranks=tp):
        assert all(found.values()), found


def test_errors_leave_the_shards_as_they_were(pool: Pool) -> None:
    first, second = pool.run(ranks.errors)
    assert all(unchanged for found in (first, second) for _, unchanged in found.values())
    assert first["alone"][0] == "nothing"
    assert second["alone"][0] == "KeyError: 'mine'"
    assert second["together"][0] == "KeyError: 'mine'"
    assert first["together"][0] == "RuntimeError: on rank 1 of 2: KeyError: 'mine'"
    parts = {
        "a shape": f"{ranks.COLUMN}: got a tensor of shape [3] at the end, expected [64, 64]",
        "a rank": "modifier_rank: got 7 (int), expected a global rank, from 0 to 1",
        "other ranks": "modifier_rank: 0 on rank 0, but 1 on rank 1",
        "a name": "got 'model.layers.0.self_attn.q_proj.weight' (str), expected a parameter",
        "a forward": "LlamaForCausalLM was called while gather_params holds full parameters",
        "not sharded": "a parameter of shape [2] that is of no sharded model",
    }
    for key, part in parts.items():
        assert part in first[key][0], first[key]
        assert part in second[key][0], second[key]


def test_weights_are_drawn_anew_while_they_are_full_alone(pool: Pool) -> None:
    for found in pool.run(ranks.draws):
        assert found.pop("full") == "nothing"
        assert found.pop("other functions") == "nothing"
        for drawn in found.values():
            assert "expected a full one; draw new weights within" in drawn, found


@pytest.mark.parametrize(
    ("zero", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")],
)
def test_optimizers_go_on_from_what_was_written(pool: Pool, zero: int, precision: str) -> None:
    setting = Setting(tp=2, zero=zero, clip=0.0, precision=precision)
    for found in pool.run(ranks.engine_writes, setting, {}, ranks=4):
        assert all(found.values()), found


def test_the_optimizer_of_bf16_gradients_in_float32_goes_on_from_what_was_written(
    pool: Pool,
) -> None:
    setting = Setting(tp=2, zero=1, clip=0.0, precision="bf16")
    extra: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}
    for found in pool.run(ranks.engine_writes, setting, extra, ranks=4):
        assert all(found.values()), found
