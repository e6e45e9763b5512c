# SPDX-License-Identifier: Apache-2.0
"""A stand-in of NCCL for CPU memory, compiled."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "emulated" / "fake_nccl.c"


def compiled(target: Path, *options: str) -> Path:
    command = ["cc", "-O2", "-std=c11", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    command += [f"-iquote{ROOT / 'csrc'}"]
    command += [*options, str(SOURCE), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target
