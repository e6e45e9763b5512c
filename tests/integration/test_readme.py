# SPDX-License-Identifier: Apache-2.0
"""The scripts in the README run as they stand, and the ranks of a TP group agree."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCED = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MAX_LINES = 15
# "step 0 loss 4.1781" of a loop, "'loss': '4.178'" of the Trainer, which rank 0 alone prints.
LOSS = re.compile(r"(?:step \d loss |'loss': '?)(\d+\.\d+)")


def scripts() -> list[str]:
    return FENCED.findall((ROOT / "README.md").read_text())


def test_the_readme_has_three_short_scripts() -> None:
    assert [call in script for script, call in zip(scripts(), CALLS, strict=True)] == [True] * 3
    assert max(len(script.splitlines()) for script in scripts()) <= MAX_LINES


CALLS = ("deepspeed_autotp.initialize(", "deepspeed_autotp.install()", "deepspeed_autotp.parallel")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "index",
    [
        pytest.param(0, id="initialize"),
        pytest.param(1, id="install"),
        pytest.param(2, id="parallelize"),
        pytest.param(0, id="initialize as a user does, with a compiler", marks=pytest.mark.long),
    ],
)
def test_a_script_of_the_readme_trains_on_two_ranks(index: int, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(scripts()[index])
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        + ["--nproc-per-node=2", "train.py"],
        cwd=tmp_path,
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(loss) for loss in LOSS.findall(done.stdout)]
    printed = 1 if index == 1 else 2
    assert len(losses) == 3 * printed, done.stdout
    assert len(set(losses)) == 3, "the ranks of a TP group have one loss"
    assert losses[-1] < losses[0]
    assert done.stderr.count("LlamaForCausalLM: 16 parameters sharded over 2 ranks (") == 1
