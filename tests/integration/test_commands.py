# SPDX-License-Identifier: Apache-2.0
"""``autotp inspect``, ``merge`` and ``reshard`` of checkpoints, without ranks."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.commands_ranks import from_pretrained, save
from tests.support.autotp_command import command
from tests.support.engine_config import Setting
from tests.support.loss_curves import worst_difference
from tests.support.resumed_runs import Case, load_and_go_on, save_and_go_on
from tests.support.worker_pool import Pool

EXPERTS = Case(
    "qwen3_moe",
    changes={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
)
TIED = Case()
FUSED = Case("phi3", tied=False)


@pytest.mark.parametrize(
    ("case", "tp", "zero", "precision"),
    [(TIED, 2, 0, "fp32"), (FUSED, 4, 1, "bf16"), (EXPERTS, 2, 3, "bf16")],
    ids=["tied", "fused, ZeRO 1", "experts, ZeRO 3"],
)
def test_merged_weights_are_those_of_the_run(
    pool: Pool, case: Case, tp: int, zero: int, precision: str, tmp_path: Path
) -> None:
    setting = Setting(tp=tp, zero=zero, clip=1.0, precision=precision)
    full = pool.run(save, case, setting, str(tmp_path / "run"), ranks=4)[0]
    out = tmp_path / "merged"
    asked = ("merge", str(tmp_path / "run"), str(out), "--max-file-gb", "0.00005")
    status, _, errors = pool.run(command, *asked, ranks=1)[0]
    assert status == 0, errors
    assert len(list(out.glob("*.safetensors"))) > 1
    merged = pool.run(from_pretrained, str(out), ranks=1)[0]
    assert merged.keys() == full.keys()
    assert all(torch.equal(merged[name], full[name].to(merged[name].dtype)) for name in full)
    assert sorted(tmp_path.iterdir()) == [out, tmp_path / "run"]
    if zero:
        script = [sys.executable, str(tmp_path / "run" / "zero_to_fp32.py"), str(tmp_path / "run")]
        found = subprocess.run(script, capture_output=True, text=True, check=False)
        assert found.returncode == 1
        assert "run: autotp merge CHECKPOINT_FOLDER OUTPUT_FOLDER" in found.stderr

    status, _, errors = pool.run(command, *asked, ranks=1)[0]
    assert status == 2
    assert "exists, expected a folder that is empty or not there" in errors


@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32")])
def test_a_resharded_checkpoint_goes_on_unsharded(
    pool: Pool, zero: int, precision: str, tmp_path: Path
) -> None:
    saved = Setting(tp=2, zero=zero, clip=1.0, precision=precision)
    made = Setting(tp=1, zero=zero, clip=1.0, precision=precision)
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    expected = pool.run(save_and_go_on, TIED, saved, run, 3, ranks=2)[0]
    status, _, errors = pool.run(command, "reshard", run, out, "--tp", "1", "--dp", "2", ranks=1)[0]
    assert status == 0, errors
    got = pool.run(load_and_go_on, TIED, made, out, 3, ranks=2)
    worst = max(worst_difference(losses, expected) for losses in got)
    assert worst < (1e-5 if precision == "fp32" else 2e-2)

    found, merged = [], []
    for folder in (run, out):
        _, text, _ = pool.run(command, "inspect", folder, "--json", ranks=1)[0]
        found.append(json.loads(text))
        config = Path(found[0]["folder"], "config.json")
        asked = ("merge", folder, f"{folder}-full", "--master", "--config", str(config))
        status, _, errors = pool.run(command, *asked, ranks=1)[0]
        assert status == 0, errors
        merged.append(Path(f"{folder}-full", "model.safetensors").read_bytes())
    assert [each["tp_size"] for each in found] == [2, 1]
    for key in ("parameters", "states", "steps", "problem"):
        assert found[0][key] == found[1][key], key
    assert merged[0] == merged[1]


def test_a_checkpoint_with_other_data_parallel_ranks_loads_without_resharding(
    pool: Pool, tmp_path: Path
) -> None:
    saved, run, out = Setting(tp=2, zero=1, clip=1.0), str(tmp_path / "run"), str(tmp_path / "out")
    expected = pool.run(save_and_go_on, FUSED, saved, run, 3, ranks=2)[0]
    status, _, errors = pool.run(command, "reshard", run, out, "--tp", "2", "--dp", "2", ranks=1)[0]
    assert status == 0, errors
    got = pool.run(load_and_go_on, FUSED, saved, out, 3, ranks=4)
    assert max(worst_difference(losses, expected) for losses in got) < 1e-5


FIRST, FIRST_OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def remove(file: Path) -> None:
    file.unlink()


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2000])


def step_more(file: Path) -> None:
    states = torch.load(file, weights_only=False)
    states["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] += 1
    torch.save(states, file)


def train_more(file: Path) -> None:
    torch.save(torch.load(file, weights_only=False) | {"global_steps": 99}, file)


def halve(file: Path) -> None:
    states = torch.load(file, weights_only=False)
    states["module"]["model.norm.weight"] = states["module"]["model.norm.weight"].half()
    torch.save(states, file)


def test_inspect_says_what_is_there_and_what_is_missing(pool: Pool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pool.run(save, TIED, Setting(tp=2, zero=1, clip=1.0), str(run), ranks=4)
    status, out, _ = pool.run(command, "inspect", str(run), "--json", ranks=1)[0]
    found = json.loads(out)
    assert status == 0
    assert (found["tp_size"], found["replicas"], found["steps"]) == (2, 2, 2)
    assert found["states"] == ["step", "exp_avg", "exp_avg_sq", "fp32"]
    assert found["written_by"].startswith("deepspeed-autotp ")
    assert found["model"] == "LlamaForCausalLM"
    status, out, _ = pool.run(command, "inspect", str(run), ranks=1)[0]
    assert status == 0
    assert "TP size 2, 2 data-parallel" in out

    folder = run / "global_step2"
    half = tmp_path / "half"  # which is no checkpoint of TP size 1
    shutil.copytree(folder, half, ignore=shutil.ignore_patterns("*_mp_rank_01_*", "mp_rank_01_*"))
    (half / "tensor_parallel.json").unlink()
    status, out, _ = pool.run(command, "inspect", str(half), "--json", ranks=1)[0]
    assert status == 1
    assert "tensor_parallel.json: got none" in json.loads(out)["problem"]
    optimizer, weights = "zero_pp_rank_1_mp_rank_01_optim_states.pt", "mp_rank_01_model_states.pt"
    for name, damage, words in [
        (optimizer, remove, f"{optimizer} missing"),
        (optimizer, cut_off, "it may have been cut off"),
        (optimizer, step_more, f"unit 0 is 2.0 in {FIRST_OPTIMIZER!r} and 3.0 in {optimizer!r}"),
        (weights, train_more, f"global_steps is 2 in {FIRST!r} and 99 in {weights!r}, expected"),
        (weights, halve, "the data type of model.norm.weight is torch.float32 in"),
    ]:
        damaged = tmp_path / "damaged"
        shutil.copytree(folder, damaged)
        pool.run(damage, damaged / name, ranks=1)
        status, out, _ = pool.run(command, "inspect", str(damaged), "--json", ranks=1)[0]
        assert status == 1
        assert words in json.loads(out)["problem"]
        shutil.rmtree(damaged)
    file = folder / "mp_rank_00_model_states.pt"
    states = torch.load(file, weights_only=False)
    for change, words in [
        ({"model.norm.weight": None}, "has no 'model.norm.weight', as save_checkpoint(exclude_"),
        ({"_orig_mod.model.norm.weight": torch.ones(64)}, "neither a buffer nor a parameter"),
    ]:
        module = {n: t for n, t in {**states["module"], **change}.items() if t is not None}
        torch.save({**states, "module": module}, file)
        status, _, errors = pool.run(command, "merge", str(run), str(tmp_path / "out"), ranks=1)[0]
        assert status == 2
        assert words in errors
    torch.save(states, file)
    merging = ("merge", str(run), str(tmp_path / "out"))
    for size in ("nan", "0", "-1", "inf"):
        status, _, errors = pool.run(command, *merging, f"--max-file-gb={size}", ranks=1)[0]
        assert (status, "--max-file-gb: got" in errors) == (2, True)
    for text in ('{"model_type": ', "[]", None):
        (folder / "config.json").unlink()
        if text is not None:
            (folder / "config.json").write_text(text)
        status, _, errors = pool.run(command, *merging, ranks=1)[0]
        assert status == 2
        words = "has no config.json" if text is None else "expected a JSON object"
        assert words in errors
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_is_said_with_what_to_name(tmp_path: Path) -> None:
    trainer, full, torch_ = tmp_path / "trainer", tmp_path / "full", tmp_path / "torch"
    for name in ("checkpoint-9/latest", "checkpoint-10/latest", "checkpoint-11/model.safetensors"):
        (trainer / name).parent.mkdir(parents=True)
        (trainer / name).write_text("global_step1")
    for file in (full / "model.safetensors", torch_ / ".metadata"):
        file.parent.mkdir()
        file.touch()
    for path, words in [
        (tmp_path / "nowhere", "/nowhere' does not exist, expected a checkpoint of DeepSpeed"),
        (full / "model.safetensors", f"is a file, expected a ch|name its folder, '{full}'"),
        (trainer, f"such as '{trainer / 'checkpoint-10'}'"),
        (trainer / "checkpoint-9", "names 'global_step1' in its file 'latest', where no file"),
        (full, "with its model.safetensors it is what from_pretrained loads as it is"),
        (torch_, "with its .metadata torch.distributed.checkpoint.load loads it"),
        (
            tmp_path,
            "has no file *_model_states.pt, expected a checkpoint of DeepSpeed, or a folder",
        ),
    ]:
        for asked in (("inspect",), ("merge", str(tmp_path / "out"))):
            status, _, errors = command(asked[0], str(path), *asked[1:])
            assert status == 2
            assert [each for each in words.split("|") if each not in errors] == [], errors


@pytest.mark.parametrize("name", ["inspect", "merge", "reshard"])
def test_the_help_explains_every_argument(name: str) -> None:
    said = command(name, "--help")[1].partition("positional arguments:\n")[2]
    explained = re.findall(r"^  (\w+) +\w", said.partition("\nexample")[0], re.MULTILINE)
    assert explained == ["checkpoint"] + ["out"] * (name != "inspect")
