# SPDX-License-Identifier: Apache-2.0
"""`autotp doctor` prints what is there and what would be used."""

import re
from pathlib import Path

import pytest
import torch

from deepspeed_autotp import _core
from deepspeed_autotp.cli import doctor, main
from deepspeed_autotp.native import operators


def rows() -> dict[str, str]:
    return {name: found for part in doctor.examine().values() for name, found in part}


def test_doctor_names_versions_build_and_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for words in (torch.__version__, "PCRE2", str(_core.core_info()["pcre2"]), "CUDA library"):
        assert words in printed
    found = rows()
    assert re.fullmatch(r"torch \d+\.\d+\.\d+ headers, serves 2\.10 and later; .+", found["_ops"])
    assert Path(found["_core"]).name.startswith("_core")
    assert "gloo on the CPU" in found["collectives"]
    if not torch.cuda.is_available():
        assert found["torch sees"] == "no GPU"


def test_doctor_says_why_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    none = operators.Library(reason="it is [away]", path="", archs=(), toolkit=(0, 0))
    monkeypatch.setattr(operators, "find_library", lambda: none)
    assert rows()["CUDA library"] == "none: it is [away]"
    assert "architectures" not in rows() and "CUDA library sees" not in rows()
    assert doctor.examined_table().row_count > 10


def test_doctor_names_a_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    there = operators.Library(reason="", path="lib.so", archs=(80, 90), toolkit=(13, 0))
    monkeypatch.setattr(operators, "find_library", lambda: there)
    monkeypatch.setattr(operators, "devices", lambda: operators.Devices(0, 35, "too old"))
    assert rows()["CUDA library sees"] == (
        "no NVIDIA driver, or one older than the library needs: too old (CUDA error 35)"
    )
    assert rows()["architectures"] == "80, 90, and intermediate code of 90 for later ones"


def test_a_command_that_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["docter"]) == 2
    said = capsys.readouterr().err
    assert "unknown command 'docter'" in said and "did you mean doctor?" in said
