# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, each on a small case."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = {
    "plan": (["--layers=2", "--experts=3", "--repeats=1"], "plan of 53 parameters"),
    "layers": (["--calls=2", "--repeats=1"], "row, bias"),
    "lookup": (
        ["--tokens=8", "--vocabulary=64", "--features=16", "--repeats=1"],
        "[8, 16] of 16 rows, 4 ranks, bfloat16",
    ),
    "exchanges": (["2", "3"], "exchange   3 ranks"),
    "experts": (
        ["--experts=4", "--models", "--tp=2", "--hidden=32", "--inner=64", "--tokens=16"]
        + ["--repeats=1"],
        "largest share",
    ),
    "startup": (["--ranks=2,4", "--rounds=1"], "initialize       4         3"),
    "shard": (["--features=64", "--repeats=1", "--threads=1"], "fused, TP 4"),
}


QUICK = ("plan", "shard")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.long) for n in SMALL]
)
def test_a_benchmark_runs_and_prints_its_table(name: str) -> None:
    options, expected = SMALL[name]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *options],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


@pytest.mark.long
def test_the_benchmark_of_saving_measures_both_ways_of_ours() -> None:
    small = ["--tp=2", "--layers=1", "--rounds=1", "--ways=gathered,parallel"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.save", *small],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert " 2  gathered" in done.stdout and " 2  parallel" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_benchmark_measures_nothing_and_says_so() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "gpu.py")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("no GPU: nothing was measured (torch ")


@pytest.mark.gpu
def test_the_gpu_benchmark_prints_its_table() -> None:
    small = [
        "--features=768",
        "--tensors=50",
        "--tokens=64",
        "--layers=1",
        "--gib=1",
        "--repeats=2",
    ]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "gpu.py"), *small], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "pack fused q|k|v" in done.stdout and "F.cross_entropy" in done.stdout
    assert "lookup and gradient" in done.stdout
