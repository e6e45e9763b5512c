# SPDX-License-Identifier: Apache-2.0
"""A disk that is soon full."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted_disk(folder: Path, *, size: str) -> Iterator[Path]:
    """``folder`` as a disk of ``size``, as mount has it; skips the test where that cannot be."""
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mounted, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not possible here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
