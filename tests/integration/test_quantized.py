# SPDX-License-Identifier: Apache-2.0
"""LoRA on weights in 4 bits trains as in one process, and what cannot be right is refused.

``make loops`` runs more of them, and all stages of ZeRO.
"""

import os
from pathlib import Path

import pytest

from tests.integration import quantized_ranks
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool

ALL = bool(os.environ.get("AUTOTP_LOOPS"))
# In float32.
EXACT = {"losses": 1e-5, "gradients": 2e-6, "adapters": 1e-4}


@pytest.mark.parametrize("case", quantized_ranks.CASES)
def test_lora_on_weights_in_4_bits_trains_as_in_one_process(
    pool: Pool, case: str, tmp_path: Path
) -> None:
    parts = []
    for apart, part in pool.run(quantized_ranks.parity, case, str(tmp_path)):
        assert {what: value for what, value in apart.items() if value > EXACT[what]} == {}
        parts.append(part)
    # Both ranks have the one key/value head.
    assert sum(parts) == pytest.approx(1, abs=0.2 if case == "other blocks" else 0)


def test_products_in_bfloat16_are_checked_and_sharded(pool: Pool, tmp_path: Path) -> None:
    for (ours, plain), part in pool.run(quantized_ranks.in_16_bits, str(tmp_path)):
        assert ours == pytest.approx(plain, rel=1e-3)
        assert part == 0.5


@pytest.mark.parametrize("way", quantized_ranks.WAYS if ALL else quantized_ranks.WAYS[:1])
def test_other_ways_to_run_a_model_give_the_same_losses(
    pool: Pool, way: str, tmp_path: Path
) -> None:
    ranks = 4 if way == "DDP" else 2
    for apart in pool.run(quantized_ranks.run_otherwise, way, str(tmp_path), ranks=ranks):
        assert apart < EXACT["losses"]


def test_all_ranks_take_the_weights_of_the_first(pool: Pool, tmp_path: Path) -> None:
    for ours, copied in pool.run(quantized_ranks.other_weights, str(tmp_path)):
        assert ours < 1e-5 and copied < 1e-5


def test_adapters_come_later_and_what_needs_full_weights_is_refused(
    pool: Pool, tmp_path: Path
) -> None:
    first, second = pool.run(quantized_ranks.late, str(tmp_path))
    assert first == second
    apart, loaded, said = first
    assert apart < EXACT["losses"] and loaded < 1e-5
    for name, error in said.items():
        assert error.startswith("ValueError: ")
        part = {
            "merge_and_unload": "adapters cannot be merged",
            "merge_adapter": "adapters cannot be merged",
            "save_pretrained": "is quantised, expected plain weights",
        }.get(name, f"{name}: ")
        assert part in error, name


def test_other_quantised_weights_are_refused_by_name(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(quantized_ranks.refusals, str(tmp_path))
    assert first == second
    parts = {
        "8 bits": "got load_in_8bit, expected load_in_4bit",
        "split blocks": "rank 0 would hold 96 elements from 0 on out of each 192, expected whole "
        "blocks of 64 elements, as which bitsandbytes has quantised it: choose another TP size",
        "head": "lm_head.weight: got a weight in 4 bits, expected one in floating point",
        "storage": "bnb_4bit_quant_storage: got torch.bfloat16, expected torch.uint8",
        "integers": "0.0.weight: got torch.int8, a quantised weight",
        "as shards": "quantization_config: got load_in_4bit",
    }
    for name, error in first.items():
        expected = parts.get(name, f"quantization_config: got '{name}', expected weights in")
        assert error.startswith("ValueError: ") and expected in error, (name, error)


def test_engines_train_weights_in_4_bits_and_go_on_from_a_checkpoint(
    pool: Pool, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    (expected,) = pool.run(quantized_ranks.curve, folder, ranks=1)
    for zero in range(4) if ALL else (2,):
        ranks = 4 if ALL else 2
        for losses, again, packed in pool.run(
            quantized_ranks.engine_curve, folder, zero, ranks=ranks
        ):
            assert losses == pytest.approx(expected, rel=1e-5)
            assert packed == 0
            assert again == pytest.approx(losses[-len(again) :], rel=1e-5)
    said = same_error(pool.run(quantized_ranks.load_at_another_size, folder, 2, ranks=2))
    assert "weight in 4 bits" in said and "save the adapter" in said


def test_a_trainer_logs_and_saves_what_one_process_does(pool: Pool, tmp_path: Path) -> None:
    folder = str(tmp_path)
    pool.run(quantized_ranks.write, quantized_ranks.Case(), folder, ranks=1)
    runs = [
        pool.run(quantized_ranks.trainer, folder, tp, resumes, ranks=tp)
        for tp in (1, 2)
        for resumes in ((False, True) if ALL else (False,))
    ]
    expected, adapter = runs[0][0]
    for losses, saved in runs[-1]:
        assert losses == pytest.approx(expected, rel=1e-5)
        assert saved.keys() == adapter.keys()
        assert max(float((saved[n] - adapter[n]).abs().max()) for n in saved) < EXACT["adapters"]
