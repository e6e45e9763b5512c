# SPDX-License-Identifier: Apache-2.0
"""The process that runs cells, as its user sees it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from tests.support.faults.cell import Cell
from tests.support.faults.server import Found

ROOT = Path(__file__).resolve().parents[3]


class FaultServer:
    """Starts at the first cell, since that imports for seconds; a context that ends it."""

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._env = {
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "lo",
            "MKL_CBWR": "COMPATIBLE",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **(env or {}),
        }
        self._process: subprocess.Popen[str] | None = None

    def run(self, cell: Cell) -> Found:
        """How the ranks of a cell have ended."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asdict(cell)) + "\n")
        process.stdin.flush()
        return Found.of(self._answer())

    def __enter__(self) -> "FaultServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.communicate()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.faults.server"],
                cwd=ROOT,
                env={**os.environ, **self._env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._answer()
        return self._process

    def _answer(self) -> str:
        """The next line of the process. RuntimeError where it has ended instead."""
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of faults has ended, status {self._process.wait()}")
        return line
