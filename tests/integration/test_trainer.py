# SPDX-License-Identifier: Apache-2.0
"""A stock Trainer script with install(): TP 2 x DP 2 logs what DP 2 without TP logs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.trainer_script import Script, run_script, save_untrained, saved_loss
from tests.support.worker_pool import Pool
from tests.support.worker_process import EXTENSIONS

ROOT = Path(__file__).resolve().parents[2]
LOGGED = ("loss", "grad_norm", "eval_loss")
TIES = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
# What the script is run with beside the defaults of TrainingArguments.
MORE = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "no clipping": {"max_grad_norm": 0.0},
    "checkpointing": {"gradient_checkpointing": True},
    "best model": {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
    "only model": {"save_only_model": True},
}


def logged(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """What is compared, entry by entry; times and the summary of the run are left out."""
    rows = [{key: row[key] for key in ("step", *LOGGED) if key in row} for row in history]
    return [row for row in rows if len(row) > 1]


def assert_near(got: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [row.keys() for row in got] == [row.keys() for row in expected]
    worst = {
        (int(b["step"]), key): abs(a[key] - b[key]) / abs(b[key])
        for a, b in zip(got, expected, strict=True)
        for key in b
    }
    assert {place: value for place, value in worst.items() if not value <= 1e-4} == {}


def assert_same_training(pool: Pool, folder: Path, **script: Any) -> list[dict[str, float]]:
    """Compare TP 2 x DP 2 with DP 2; what the sharded run logged."""
    sharded = Script(str(folder / "sharded"), tp=2, **script)
    plain = Script(str(folder / "plain"), tp=1, **script)
    got = logged(pool.run(run_script, sharded, ranks=4)[0])
    assert sum("eval_loss" in row for row in got) == 2
    assert_near(got, logged(pool.run(run_script, plain, ranks=2)[0]))
    return got


def assert_saved(pool: Pool, folder: str, loss: float) -> None:
    (found,) = pool.run(saved_loss, folder, ranks=1)
    assert abs(found - loss) <= 1e-5 * loss


@pytest.mark.sample(3)
@pytest.mark.parametrize("zero", [1, 2, 3])
@TIES
def test_logs_and_saved_models_equal_data_parallel_training(
    pool: Pool, zero: int, tied: bool, tmp_path: Path
) -> None:
    got = assert_same_training(pool, tmp_path, zero=zero, tied=tied)
    middle, end = (row["eval_loss"] for row in got if "eval_loss" in row)
    assert_saved(pool, f"{tmp_path}/sharded/checkpoint-2", middle)
    assert_saved(pool, f"{tmp_path}/sharded/checkpoint-4", end)
    assert_saved(pool, f"{tmp_path}/sharded/final", end)


@pytest.mark.sample(2)
@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_arguments_of_the_trainer_hold_with_tensor_parallelism(
    pool: Pool, more: dict[str, Any], tmp_path: Path
) -> None:
    got = assert_same_training(pool, tmp_path, more=more)
    evals = [row["eval_loss"] for row in got if "eval_loss" in row]
    best = more.get("load_best_model_at_end", False)
    assert_saved(pool, f"{tmp_path}/sharded/final", min(evals) if best else evals[-1])


def test_biases_and_a_pretrained_model_train_alike(pool: Pool, tmp_path: Path) -> None:
    """The usual order: arguments first, then from_pretrained."""
    folder = str(tmp_path / "pretrained")
    pool.run(save_untrained, folder, "qwen2", ranks=1)
    got = assert_same_training(pool, tmp_path, pretrained=folder)
    assert_saved(pool, f"{tmp_path}/sharded/final", got[-1]["eval_loss"])


@pytest.mark.sample(6)
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_resumed_run_logs_what_an_uninterrupted_one_does(
    pool: Pool, zero: int, bf16: bool, tmp_path: Path
) -> None:
    more = {"bf16": bf16}
    uninterrupted = pool.run(
        run_script, Script(str(tmp_path), tp=2, zero=zero, more=more), ranks=4
    )[0]
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = Script(str(tmp_path), tp=2, zero=zero, more=more, resume=True)
    resumed = pool.run(run_script, again, ranks=4)[0]
    assert [row["step"] for row in logged(resumed)] == [1, 2, 2, 3, 4, 4]
    assert logged(resumed) == logged(uninterrupted)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("tp", "zero"), [(4, 1), (1, 2)])
def test_a_run_is_resumed_at_another_tp_size(
    pool: Pool, tp: int, zero: int, tmp_path: Path
) -> None:
    saved = Script(str(tmp_path), tp=2, zero=zero)
    uninterrupted = pool.run(run_script, saved, ranks=2)[0]
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = Script(str(tmp_path), tp=tp, zero=zero, resume=True)
    assert_near(logged(pool.run(run_script, again, ranks=tp)[0]), logged(uninterrupted))


@pytest.mark.long
@pytest.mark.timeout(900)  # DeepSpeed compiles an operation for the first run on a machine
def test_the_example_trains_like_one_process_without_a_word_from_us(
    tmp_path: Path,
) -> None:
    def run(ranks: int, *options: str) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", str(ROOT / "examples" / "train_trainer.py")]
        quiet = {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}
        done = subprocess.run(
            [*command, *options],
            env=os.environ | quiet,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=420,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def history(out: str) -> list[dict[str, float]]:
        state = json.loads((tmp_path / out / "trainer_state.json").read_text())
        return logged(state["log_history"])

    said = run(2, "--tp", "2", "--out", "sharded")
    assert not re.search("deepspeed_autotp|Traceback", said)
    run(1, "--tp", "1", "--out", "plain")
    assert_near(history("sharded"), history("plain"))
