# SPDX-License-Identifier: Apache-2.0
"""``autotp plan`` and ``explain``: what a run would hold, without weights and ranks."""

import json
import re
from pathlib import Path

import pytest

from tests.integration.plan_command_ranks import rank_bytes
from tests.support.autotp_command import command
from tests.support.worker_pool import Pool

LLAMA = (
    "llama:hidden_size=64,intermediate_size=96,num_hidden_layers=2,num_attention_heads=8,"
    "num_key_value_heads=2,vocab_size=100"
)
PHI3 = LLAMA.replace("llama", "phi3") + ",pad_token_id=0,tie_word_embeddings=true"


@pytest.mark.parametrize(("model", "tp"), [(LLAMA, 3), (PHI3, 2)])
def test_the_bytes_of_each_rank_are_those_that_parallelize_leaves(
    pool: Pool, model: str, tp: int
) -> None:
    status, out, errors = command("plan", model, "--tp", str(tp), "--dtype", "bf16", "--json")
    assert status == 0, errors
    assert json.loads(out)["bytes_per_rank"] == pool.run(rank_bytes, model, ranks=tp)


def test_the_table_and_an_explanation_name_rule_and_shapes() -> None:
    _, table, _ = command("plan", LLAMA, "--tp", "2")
    assert re.search(r"layers\.\*\.self_attn\.q_proj\.weight x2 +column +64x64 +32x64", table)
    assert "tp_plan: colwise" in table
    _, text, _ = command("explain", LLAMA, "model.layers.1.mlp.down_proj.weight", "--tp", "2")
    assert "model.layers.*.mlp.down_proj: rowwise" in text
    assert "[64, 48], 48 to 95 of 96 along dim 1" in text


def test_rules_of_a_configuration_decide(tmp_path: Path) -> None:
    specs = [{"patterns": [".*"], "partition_type": "skip"}]
    specs.insert(0, {"patterns": [".*up_proj.*"], "gather_output": True})  # type: ignore[dict-item]
    section = {"partition_config": {"layer_specs": specs}}
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"tensor_parallel": section}))
    _, out, _ = command("plan", LLAMA, "--tp", "2", "--config", str(config), "--json")
    kinds = {row["pattern"]: row["kind"] for row in json.loads(out)["parameters"]}
    assert [name for name, kind in kinds.items() if kind == "column"] == [
        "model.layers.*.mlp.up_proj.weight"
    ]
    section["partition_config"]["layer_specs"] = specs[1:]
    config.write_text(json.dumps({"tensor_parallel": section}))
    _, out, _ = command("plan", LLAMA, "--tp", "2", "--config", str(config))
    assert "the rules skip all of the model" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("lama",), "got 'lama', expected a folder with config.json"),
        (("lama",), "near model types are llama"),
        (("llama:hiden_size=3",), "llama has no 'hiden_size' in its configuration; near names"),
        (("llama:hidden_size",), "got 'hidden_size' among the overrides, expected key=value"),
        (("llama:hidden_size=63",), "no llama can be made with"),
        (
            ("llama:hidden_size=64k",),
            "no llama can be made with {'hidden_size': '64k'}: Validation ",
        ),
        (("llama:hidden_size=64k",), "expected int"),
        ((str(Path(__file__)),), "test_plan_command.py' cannot be read: Expecting value"),
        (("torch.nn:Linear",), "torch.nn:Linear made no model: TypeError"),
        (("torch:zeros_like",), "torch:zeros_like made no model"),
        (("builtins:dict",), "returned dict, expected a torch.nn.Module"),
    ],
)
def test_what_names_no_model_is_said(arguments: tuple[str, ...], words: str) -> None:
    status, _, errors = command("plan", *arguments, "--tp", "2")
    assert status == 2
    assert words in errors


def test_a_section_with_a_slip_in_its_name_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"tensor_paralel": {"autotp_size": 2}}))
    status, _, errors = command("plan", LLAMA, "--tp", "2", "--config", str(config))
    assert status == 2 and "Did you mean 'tensor_parallel'?" in errors


def test_wrong_sizes_types_and_names_are_said() -> None:
    assert "--tp: got 1, expected 2 or more" in command("plan", LLAMA, "--tp", "1")[2]
    assert "--dtype" in command("plan", LLAMA, "--tp", "2", "--dtype", "bf61")[2]
    _, _, errors = command("explain", LLAMA, "model.layers.0.mlp.up.weight", "--tp", "2")
    assert "such as model.layers.0.mlp.up_proj.weight" in errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--tp: expected a TP size, such as 2, or --suggest"),
        (("--tp", "2", "--dp", "0"), "--dp: got 0, expected 1 or more"),
        (("--tp", "2", "--seq", "-1"), "--seq: got -1, expected 1 or more"),
        (("--tp", "2", "--seq", "99999999999"), "--seq: got 99999999999 tokens of a micro-batch"),
        (("--tp", "2", "--micro-batch", "2"), "--micro-batch: got no --seq beside it"),
        (("--tp", "2", "--zero", "4"), "--zero: got 4, expected 0 to 3"),
        (("--tp", "2", "--optimizer", "adamv"), "got 'adamv', expected one whose states are"),
        (("--tp", "2", "--bandwidth", "450Gb/s"), "--bandwidth: got '450Gb/s', expected bytes"),
        (("--tp", "2", "--lora", "16"), "--lora: got '16', expected r=16"),
        (("--tp", "2", "--gpus", "8"), "--gpus: expected --suggest beside it"),
        (("--suggest",), "--suggest: expected --gpus 16 --gpu-memory 80GiB"),
        (("--suggest", "--gpus", "4", "--gpu-memory", "80"), "expected a size such as 80GiB"),
        (("--suggest", "--gpus", "4", "--gpu-memory", "80kB"), None),
        (
            ("--suggest", "--gpus", "4", "--gpu-memory", "80GiB", "--tp", "2"),
            "--tp: got it with --suggest, which tries all, expected one",
        ),
        (("--suggest", "--gpus", "4", "--gpu-memory", "much"), "expected a size such as 80GiB"),
    ],
)
def test_wrong_options_of_an_estimate_are_said(options: tuple[str, ...], words: str | None) -> None:
    status, out, errors = command(
        "plan", LLAMA, *options, *(("--seq", "8") if words is None else ())
    )
    if words is None:
        assert status == 0
        assert "does not fit: needs" in out and "nothing fits: try more GPUs" in out
    else:
        assert status == 2
        assert words in errors


def test_an_estimate_shows_memory_and_collectives() -> None:
    options = ("--dp", "2", "--zero", "2", "--seq", "16", "--bandwidth", "1GB/s", "--lora", "r=4")
    status, out, errors = command("plan", LLAMA, "--tp", "2", *options)
    assert status == 0, errors
    assert re.search(r"trained parameters +\d", out)
    for words in ("optimizer states", "activations", "communication buffers", "peak"):
        assert words in out
    assert re.search(r"all-reduce +2 TP ranks +.*mlp.down_proj +forward +2 ", out)
    assert re.search(r"all-gather +2 replicas +trained weights +step", out)
    assert "uneven shards" not in out
    status, out, _ = command("plan", LLAMA, "--tp", "3", "--gradient-checkpointing", "--seq", "16")
    assert status == 0
    assert "several ranks hold the same runs" in out
    assert "uneven shards" in out
