# SPDX-License-Identifier: Apache-2.0
"""``autotp reshard`` writes what a run of the other size would that loads and saves at once."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.reshard_ranks import load_and_save, save, write_config
from tests.support.autotp_command import command
from tests.support.checkpoint_differences import differences
from tests.support.engine_config import Setting
from tests.support.resumed_runs import Case
from tests.support.worker_pool import Pool

TIED = Case()
FUSED = Case("gpt2", changes={"n_embd": 64, "n_head": 8, "n_layer": 2})
EXPERTS = Case("mixtral", tied=False, changes={"num_local_experts": 4}, frozen="q_proj")


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("case", "pair", "zero", "precision"),
    [
        (TIED, (2, 4, 4, 4), 1, "bf16"),
        pytest.param(TIED, (4, 4, 2, 2), 0, "fp32", marks=pytest.mark.long),
        (replace(TIED, frozen="k_proj"), (2, 2, 3, 3), 2, "fp32"),
        (FUSED, (2, 4, 4, 4), 2, "bf16"),
        pytest.param(EXPERTS, (4, 4, 2, 4), 3, "fp32", marks=pytest.mark.long),
        (TIED, (2, 4, 1, 2), 3, "bf16"),
        (TIED, (1, 2, 2, 4), 1, "fp32"),
    ],
)
def test_files_are_those_of_a_run_of_the_other_size(
    pool: Pool,
    case: Case,
    pair: tuple[int, int, int, int],
    zero: int,
    precision: str,
    tmp_path: Path,
) -> None:
    tp, ranks, new_tp, new_ranks = pair
    saved = Setting(tp=tp, zero=zero, clip=1.0, precision=precision)
    made = Setting(tp=new_tp, zero=zero, clip=1.0, precision=precision)
    run, expected, out, again = (
        str(tmp_path / name) for name in ("run", "expected", "out", "again")
    )
    pool.run(save, case, saved, run, ranks=ranks)
    assert not any(pool.run(load_and_save, case, made, run, expected, ranks=new_ranks))
    asked = ["--tp", str(new_tp), "--dp", str(new_ranks // new_tp)]
    if case is EXPERTS:
        asked += ["--jobs", "2"]
    if tp == 1:
        asked += ["--config", str(Path(expected, "global_step2"))]
    status, _, errors = pool.run(command, "reshard", run, out, *asked, ranks=1)[0]
    assert status == 0, errors
    found = pool.run(differences, expected, out, ranks=1)[0]
    if new_tp == 1:  # an unsharded run has no files of ours
        found = [text for text in found if "config.json is in one of them" not in text]
    assert found == []
    assert all(pool.run(load_and_save, case, made, out, again, ranks=new_ranks))


def with_rules(tp: int) -> Case:
    """Rules of the user's, which leave more replicated than the model's own."""
    rules = [
        {"patterns": [r".*\.mlp\.(gate|up)_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.mlp\.down_proj\.weight$"], "partition_type": "row"},
    ]
    partition = {"layer_specs": rules, "use_default_specs": False}
    section = {"autotp_size": tp, "partition_config": partition, "tp_grain_size": 16}
    return Case(config={"tensor_parallel": section})


def whole_experts(tp: int) -> Case:
    section = {"autotp_size": tp, "expert_partition": "experts"}
    return replace(EXPERTS, frozen="", config={"tensor_parallel": section})


@pytest.mark.parametrize("case_of", [with_rules, whole_experts])
def test_the_rules_of_the_saved_run_hold_at_the_other_size(
    pool: Pool, case_of: Callable[[int], Case], tmp_path: Path
) -> None:
    saved, made = (Setting(tp=tp, zero=1, clip=1.0) for tp in (2, 3))
    run, expected, out = (str(tmp_path / name) for name in ("run", "expected", "out"))
    pool.run(save, case_of(2), saved, run, ranks=2)
    assert not any(pool.run(load_and_save, case_of(3), made, run, expected, ranks=3))
    status, _, errors = pool.run(command, "reshard", run, out, "--tp", "3", ranks=1)[0]
    assert status == 0, errors
    assert pool.run(differences, expected, out, ranks=1) == [[]]


def remove_recipe(file: Path) -> None:
    """As metadata of version 3, which has none."""
    content = json.loads(file.read_text()) | {"version": 3}
    del content["recipe"]
    file.write_text(json.dumps(content))


def let_be_custom(file: Path) -> None:
    content = json.loads(file.read_text())
    content["recipe"]["model"] = None
    file.write_text(json.dumps(content))


def shard_otherwise(file: Path) -> None:
    """As where a class of transformers has another tp_plan than what the run was sharded by."""
    content = json.loads(file.read_text())
    content["recipe"]["tp_plan"]["model.layers.*.mlp.up_proj"] = "replicate"
    file.write_text(json.dumps(content))


def narrow(file: Path) -> None:
    config = file.with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 96}))


def remove_config(file: Path) -> None:
    file.with_name("config.json").unlink()


def of_nobody(file: Path) -> None:
    content = json.loads(file.read_text())
    content["recipe"]["model"] = "LostForCausalLM"
    file.write_text(json.dumps(content))


UNKNOWN: list[tuple[Callable[[Path], None], str]] = [
    (remove_recipe, "does not say what the plan was made from, as before version 4"),
    (let_be_custom, "its model is not one of transformers without adapters"),
    (shard_otherwise, "the plan that is made from it for its own size is another one"),
    (narrow, "'model.layers.0.mlp.gate_proj.weight' has the shape [112, 64] in it, [96, 64] here"),
    (remove_config, "config.json' is missing, name a folder that has it with --config"),
    (of_nobody, "is of a 'LostForCausalLM', which transformers does not have"),
]


def test_a_size_at_which_the_shards_are_not_known_is_refused(pool: Pool, tmp_path: Path) -> None:
    pool.run(save, TIED, Setting(tp=2, zero=1, clip=1.0), str(tmp_path / "run"), ranks=2)
    for damage, words in UNKNOWN:
        run, out = tmp_path / "damaged", tmp_path / "out"
        shutil.copytree(tmp_path / "run", run)
        damage(run / "global_step2" / "tensor_parallel.json")
        status, _, errors = pool.run(command, "reshard", str(run), str(out), "--tp", "4", ranks=1)[
            0
        ]
        assert status == 2
        assert words in errors
        assert "load the checkpoint itself with autotp_size 4" in errors
        assert sorted(tmp_path.iterdir()) == [run, tmp_path / "run"]
        if damage is remove_recipe:  # what needs no plan
            status, _, errors = pool.run(
                command, "reshard", str(run), str(out), "--tp", "2", "--dp", "2", ranks=1
            )[0]
            assert status == 0, errors
            shutil.rmtree(out)
        shutil.rmtree(run)


def test_an_unsharded_checkpoint_without_names_is_refused(pool: Pool, tmp_path: Path) -> None:
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    pool.run(save, TIED, Setting(tp=1, zero=0, clip=1.0), run, ranks=1)
    config = tmp_path / "config"
    pool.run(write_config, TIED, str(config), ranks=1)
    asked = ("reshard", run, out, "--tp", "2", "--config", str(config))
    status, _, errors = pool.run(command, *asked, ranks=1)[0]
    assert status == 2
    assert "does not say which parameters its optimizer has" in errors
