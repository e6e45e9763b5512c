# SPDX-License-Identifier: Apache-2.0
"""What cannot go on at another size is refused before anything is loaded, alike on every rank."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engine_config import Setting
from tests.support.resumed_runs import (
    Case,
    refused_load,
    save_and_go_on,
    scales,
)
from tests.support.worker_pool import Pool

SAVED = Setting(tp=2, zero=1, clip=1.0)
MADE = Setting(tp=4, zero=1, clip=1.0)
OPTIMIZER = "zero_pp_rank_1_mp_rank_01_optim_states.pt"


def save(pool: Pool, folder: Path, case: Case, setting: Setting = SAVED) -> Path:
    """The folder of a checkpoint that four ranks have saved."""
    pool.run(save_and_go_on, case, setting, str(folder), 1, ranks=4)
    return folder / "global_step1"


def refused(
    pool: Pool,
    folder: Path,
    case: Case,
    setting: Setting = MADE,
    *,
    fused: bool = False,
    **asked: Any,
) -> str:
    texts = pool.run(refused_load, case, setting, str(folder), asked, fused, ranks=4)
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
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 6}))


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


def mix(folder: Path) -> None:
    """A file of a later save, under the same tag."""
    file = folder / "mp_rank_01_model_states.pt"
    torch.save(torch.load(file, weights_only=False) | {"global_steps": 2}, file)


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut_off, "it may have been cut off"),
    (remove, f"{OPTIMIZER} missing; copy the files of all ranks into one folder"),
    (remove_node, "mp_rank_01_model_states.pt"),
    (spoil, "cannot be read, expected what save_checkpoint wrote"),
    (newer, "has metadata of version 6, expected at most 5"),
    (add_weight, "'extra.weight' in the checkpoint is neither a buffer nor a parameter"),
    (mix, "has files of different saves: global_steps is 1 in 'mp_rank_00_model_states.pt' and 2"),
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


@pytest.mark.sample(3)
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


def test_states_that_were_saved_without_zero_are_refused_by_zero(
    pool: Pool, tmp_path: Path
) -> None:
    save(pool, tmp_path, Case(), replace(SAVED, zero=0))
    assert "was saved without ZeRO, and this run has" in refused(pool, tmp_path, Case(), SAVED)


def test_another_model_without_metadata_is_refused(pool: Pool, tmp_path: Path) -> None:
    unsharded = Setting(tp=1, zero=1, clip=1.0)
    save(pool, tmp_path, Case(changes={"intermediate_size": 96}), unsharded)
    assert "has the shape [96, 64] in it, [112, 64] here" in refused(pool, tmp_path, Case())


def test_weights_of_zero_3_without_its_optimizer_are_refused(pool: Pool, tmp_path: Path) -> None:
    saved, made = Setting(tp=2, zero=3, clip=1.0), Setting(tp=4, zero=3, clip=1.0)
    save(pool, tmp_path, Case(), saved)
    text = refused(pool, tmp_path, Case(), made, load_optimizer_states=False)
    assert "load it with load_optimizer_states=True" in text


@pytest.mark.sample(2)
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_dynamic_loss_scale_goes_on_on_every_rank(
    pool: Pool, zero: int, tmp_path: Path
) -> None:
    saved, made = (Setting(tp=tp, zero=zero, clip=1.0, precision="fp16") for tp in (2, 4))
    expected = pool.run(scales, Case(), saved, str(tmp_path), False, ranks=2)[0]
    assert [each["skipped"] for each in expected] == [1, 1, 1, 2, 2]
    assert len({each["cur_scale"] for each in expected}) > 1
    got = pool.run(scales, Case(), made, str(tmp_path), True, ranks=4)
    assert got == [expected] * 4


def zero_with(stage: int, **keys: Any) -> Case:
    """A run with more keys in its section ``zero_optimization``."""
    config = {"zero_optimization": {"stage": stage, **keys}, "zero_force_ds_cpu_optimizer": False}
    return Case(config=config)


# Parameters that do not end at 16 bytes.
ODD = Case("qwen3", changes={"hidden_size": 66})
ALIGNED = replace(ODD, config=zero_with(1, parameter_alignment=True).config)


CPU = {"device": "cpu"}
OTHERS = {
    "offloaded optimizer": (Case(), zero_with(1, offload_optimizer=CPU), 1, "offload_optimizer is"),
    "offloaded weights": (Case(), zero_with(3, offload_param=CPU), 3, "offload_param is set"),
    "aligned": (ODD, ALIGNED, 1, "parameter_alignment is set"),
    "elastic": (zero_with(1, elastic_checkpoint=True), Case(), 1, "elastic_checkpoint, whose"),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", OTHERS)
def test_optimizers_with_a_way_of_their_own_are_refused(
    pool: Pool, name: str, tmp_path: Path
) -> None:
    case, made, zero, words = OTHERS[name]
    save(pool, tmp_path, case, Setting(tp=2, zero=zero, clip=1.0))
    assert words in refused(pool, tmp_path, made, Setting(tp=4, zero=zero, clip=1.0))


def fuse(folder: Path) -> None:
    """As DeepSpeed saves a fused optimizer in 16 bits."""
    for file in folder.glob("*model_states.pt"):
        states = torch.load(file, weights_only=False)
        groups = states["optimizer"].pop("fp32_groups")
        states["optimizer"]["fp32_groups_flat"] = [
            torch.cat([weight.reshape(-1) for weight in group]) for group in groups
        ]
        torch.save(states, file)


def test_the_states_of_fused_optimizers_are_refused(pool: Pool, tmp_path: Path) -> None:
    saved, made = (Setting(tp=tp, zero=0, clip=1.0, precision="bf16") for tp in (2, 4))
    folder = save(pool, tmp_path, Case(), saved)
    text = refused(pool, tmp_path, Case(), made, fused=True)
    assert "has the states of an optimizer in 16 bits without ZeRO, and this run has" in text
    pool.run(fuse, folder, ranks=1)
    assert "an optimizer whose states are not known by parameter" in refused(
        pool, tmp_path, Case(), made
    )


@pytest.mark.parametrize("made", [SAVED, MADE], ids=["at its own size", "at another"])
def test_what_one_rank_cannot_read_is_an_error_of_all(
    pool: Pool, made: Setting, tmp_path: Path
) -> None:
    """As with node-local storage, or where a disk of one node is not there."""
    save(pool, tmp_path / "0", Case())
    folders = [tmp_path / str(rank) for rank in range(4)]
    for damage, words in [
        (cut_off, "it may have been cut off"),
        (remove, f"{OPTIMIZER} missing"),
        (shutil.rmtree, "got 'global_step1', and"),
        (refuse_reading, "Is a directory"),
    ]:
        for folder in folders[1:]:
            shutil.copytree(folders[0], folder)
        damage(folders[3] / "global_step1")
        text = refused(pool, tmp_path / "{rank}", Case(), made)
        assert text.startswith("on rank 3 of 4: ")
        assert words in text
        for folder in folders[1:]:
            shutil.rmtree(folder)


def refuse_reading(folder: Path) -> None:
    """Nobody is refused reading a file where tests run as root."""
    (folder / "tensor_parallel.json").unlink()
    (folder / "tensor_parallel.json").mkdir()


@pytest.mark.parametrize("tp", [2, 1])
def test_a_checkpoint_that_one_rank_does_not_see_is_refused(
    pool: Pool, tmp_path: Path, tp: int
) -> None:
    case, setting = Case(), Setting(tp=tp, zero=1, clip=1.0)
    for rank in range(4):
        (tmp_path / f"seen-by-{rank}").mkdir()
    folder = save(pool, tmp_path / "seen-by-0", case, setting).parent
    for rank in (1, 2):
        shutil.copytree(folder, tmp_path / f"seen-by-{rank}", dirs_exist_ok=True)
    text = refused(pool, tmp_path / "seen-by-{rank}", case, setting)
    assert "load_checkpoint: the ranks find different checkpoints: rank 0 'global_step1'" in text
    assert "rank 3 no checkpoint; expected one on all ranks" in text
