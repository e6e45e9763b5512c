# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, each on a small case."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALL = {
    "plan": (["--layers=2", "--experts=3", "--repeats=1"], "plan of 53 parameters"),
    "layers": (["--calls=2", "--repeats=1"], "row, bias"),
    "shard": (["--features=64", "--repeats=1", "--threads=1"], "fused, TP 4"),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs_and_prints_its_table(name: str) -> None:
    options, expected = SMALL[name]
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *options],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
