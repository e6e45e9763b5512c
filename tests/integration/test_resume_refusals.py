# SPDX-License-Identifier: Apache-2.0
"""What cannot go on at another size is refused before anything is loaded, alike on every rank."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engine_config import Setting
from tests.support.resumed_runs import (
    Case,
    loaded_scales,
    refused_load,
    save_and_go_on,
    set_loss_scale,
)
from tests.support.worker_pool import Pool

SAVED = Setting(tp=2, zero=1, clip=1.0)
MADE = Setting(tp=4, zero=1, clip=1.0)
OPTIMIZER = "zero_pp_rank_1_mp_rank_01_optim_states.pt"


def save(pool: Pool, folder: Path, case: Case, setting: Setting = SAVED) -> Path:
    """The folder of a checkpoint that four ranks have saved."""
    pool.run(save_and_go_on, case, setting, str(folder), 1, ranks=4)
    return folder / "global_step1"


def refused(pool: Pool, folder: Path, case: Case, setting: Setting = MADE, **asked: Any) -> str:
    texts = pool.run(refused_load, case, setting, str(folder), asked, ranks=4)
    assert set(texts) == {texts[0]}
    return texts[0]


def cut_off(folder: Path) -> None:
    file = folder / OPTIMIZER
    file.write_bytes(file.read_bytes()[:-1000])


def remove(folder: Path) -> None:
    (folder / OPTIMIZER).unlink()


def remove_node(folder: Path) -> None:
    """As with node-local storage, where each node has the files of its own ranks."""
    for file in folder.glob("*mp_rank_01*"):
        file.unlink()


def spoil(folder: Path) -> None:
    (folder / "tensor_parallel.json").write_text('{"version": 3, "ranks": 2}')


def newer(folder: Path) -> None:
    file = folder / "tensor_parallel.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 5}))


def reorder(folder: Path) -> None:
    """As round_robin_gradients orders parameters."""
    for file in folder.glob("*optim_states.pt"):
        states = torch.load(file, weights_only=False)
        for group in states["optimizer_state_dict"]["param_slice_mappings"]:
            for address in group.values():
                address.start += 2
        torch.save(states, file)


def add_weight(folder: Path) -> None:
    """A weight of which the layout says nothing."""
    file = folder / "mp_rank_00_model_states.pt"
    states = torch.load(file, weights_only=False)
    states["module"]["extra.weight"] = torch.ones(2)
    torch.save(states, file)


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut_off, "it may have been cut off"),
    (remove, f"{OPTIMIZER} missing; copy the files of all ranks into one folder"),
    (remove_node, "mp_rank_01_model_states.pt"),
    (spoil, "cannot be read, expected what save_checkpoint wrote"),
    (newer, "has metadata of version 5, expected at most 4"),
    (add_weight, "'extra.weight' in the checkpoint is neither a buffer nor a parameter"),
    (reorder, "has its optimizer in an order of its own"),
]


def test_a_damaged_checkpoint_is_refused(pool: Pool, tmp_path: Path) -> None:
    case = Case()
    save(pool, tmp_path / "whole", case)
    for damage, words in DAMAGES:
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", folder)
        pool.run(damage, folder / "global_step1", ranks=1)
        assert words in refused(pool, folder, case)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("case", "setting", "words"),
    [
        (Case(changes={"num_hidden_layers": 3}), MADE, "is of another model: "),
        (Case(changes={"intermediate_size": 96}), MADE, "has the shape [112, 64] in it, [96, 64]"),
        (Case(tied=False), MADE, "is tied to 'model.embed_tokens.weight' in it, to None here"),
        (Case(groups=1), MADE, "was saved with other parameter groups"),
        (Case(), Setting(tp=4, zero=0, clip=1.0), "has the states of ZeRO 1 or 2, and this run"),
        (Case(), Setting(tp=4, zero=3, clip=1.0), "and this run has ZeRO 3"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_model_or_optimizer_is_refused(
    pool: Pool, case: Case, setting: Setting, words: str, tmp_path: Path
) -> None:
    save(pool, tmp_path, Case())
    assert words in refused(pool, tmp_path, case, setting)


def test_another_model_without_metadata_is_refused(pool: Pool, tmp_path: Path) -> None:
    unsharded = Setting(tp=1, zero=1, clip=1.0)
    save(pool, tmp_path, Case(changes={"intermediate_size": 96}), unsharded)
    assert "has the shape [96, 64] in it, [112, 64] here" in refused(pool, tmp_path, Case())


def test_weights_of_zero_3_without_its_optimizer_are_refused(pool: Pool, tmp_path: Path) -> None:
    saved, made = Setting(tp=2, zero=3, clip=1.0), Setting(tp=4, zero=3, clip=1.0)
    save(pool, tmp_path, Case(), saved)
    text = refused(pool, tmp_path, Case(), made, load_optimizer_states=False)
    assert "load it with load_optimizer_states=True" in text


def test_the_loss_scale_goes_on_on_every_rank(pool: Pool, tmp_path: Path) -> None:
    pool.run(set_loss_scale, save(pool, tmp_path, Case()), 512.0, ranks=1)
    assert pool.run(loaded_scales, Case(), MADE, str(tmp_path), ranks=4) == [512.0] * 4
