# SPDX-License-Identifier: Apache-2.0
"""The files of an engine's checkpoint, from somebody who is not trusted."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler

from deepspeed_autotp.checkpoint.rank_files import CheckpointFiles

NAME = "mp_rank_00_model_states.pt"


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._file,)


def test_a_file_that_would_run_code_is_refused_unless_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    torch.save({"module": {}, "more": Hostile(made)}, tmp_path / NAME)
    with pytest.raises(ValueError, match=r"holds \S+, .*NO_WEIGHTS_ONLY_LOAD=1 if you trust"):
        CheckpointFiles(tmp_path).model(0)
    assert not made.exists()
    CheckpointFiles(tmp_path, trusted=True).model(0)
    assert made.exists()
    made.unlink()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.warns(UserWarning, match="NO_WEIGHTS_ONLY_LOAD"):
        CheckpointFiles(tmp_path).model(0)
    assert made.exists()


def test_what_client_states_often_hold_is_loaded(tmp_path: Path) -> None:
    held = {"loss": numpy.float64(2.5), "step": numpy.int64(7), "best": None, "names": ["a"]}
    torch.save({"module": {}, "scaler": LossScaler(scale=8.0), **held}, tmp_path / NAME)
    read = CheckpointFiles(tmp_path).model(0)
    assert read["scaler"].loss_scale == 8.0
    assert {key: read[key] for key in held} == held
