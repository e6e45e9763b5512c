# SPDX-License-Identifier: Apache-2.0
"""The stub of the compiled core agrees with the module."""

import os
import subprocess
import sys
from pathlib import Path

from deepspeed_autotp import _core

ROOT = Path(__file__).resolve().parents[2]


def stubtest(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Compare the module with a stub. The stub stands alone in ``folder``, so that nothing but
    the stub is read: the package itself pulls torch in, which costs mypy a minute."""
    package = folder / "deepspeed_autotp"
    package.mkdir()
    (package / "__init__.pyi").touch()
    (package / "_core.pyi").write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "--concise", "deepspeed_autotp._core"],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
    )


def test_the_stub_agrees_with_the_module(tmp_path: Path) -> None:
    stub = ROOT / "deepspeed_autotp" / "_core.pyi"
    done = stubtest(tmp_path, stub.read_text())
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stub_that_disagrees_is_found(tmp_path: Path) -> None:
    text = (ROOT / "deepspeed_autotp" / "_core.pyi").read_text()
    changed = text.replace("def split(size: int, unit: int,", "def split(size: int, units: int,")
    assert changed != text
    done = stubtest(tmp_path, changed)
    assert done.returncode == 1
    assert "_core.split" in done.stdout


def test_all_lists_every_public_name() -> None:
    public = {name for name in vars(_core) if not name.startswith("_")}
    assert set(_core.__all__) == public
    assert len(_core.__all__) == len(public)
