# SPDX-License-Identifier: Apache-2.0
"""Layers and a language model are those of one process where several ranks have one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepspeed_autotp.native import operators

ROOT = Path(__file__).resolve().parents[2]
# float32 and bfloat16 are summed in another order over ranks.
MOST = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 3e-2}


def most(name: str) -> float:
    """How far a case may be; layers alone are in float64."""
    return MOST.get(name.rpartition(".")[2], MOST["float64"])


@pytest.mark.parametrize(
    ("device", "ranks"),
    [
        # Other tests show the same on a CPU; this is the command that a GPU is given.
        pytest.param("cpu", 2, marks=pytest.mark.long),
        *(pytest.param("cuda", ranks, marks=pytest.mark.gpu) for ranks in (2, 4)),
    ],
)
def test_ranks_on_one_device_equal_one_process(device: str, ranks: int) -> None:
    if device == "cuda":
        assert operators.unavailable_reason(0) == "", (
            "torch's operations would stand in for the kernels"
        )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        + [f"--nproc-per-node={ranks}", "-m", "tests.distributed.one_device_ranks", device],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": device, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 25
    far = {
        name: distances
        for name, distances in found.items()
        if not all(d < most(name) for d in distances.values())
    }
    assert far == {}
