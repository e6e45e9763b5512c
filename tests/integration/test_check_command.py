# SPDX-License-Identifier: Apache-2.0
"""``autotp check``: a model trained sharded and in one process."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from tests.support.autotp_command import command

LLAMA = (
    "llama:hidden_size=64,intermediate_size=96,num_hidden_layers=2,num_attention_heads=8,"
    "num_key_value_heads=2,vocab_size=100"
)
CUSTOM = "tests.support.check_models"


def rules(folder: Path, *specs: dict[str, Any]) -> str:
    """A DeepSpeed configuration with these rules and no others."""
    section = {"partition_config": {"use_default_specs": False, "layer_specs": specs}}
    file = folder / "ds.json"
    file.write_text(json.dumps({"tensor_parallel": section}))
    return str(file)


def test_a_model_that_is_sharded_right_is_equal_module_by_module() -> None:
    status, out, errors = command("check", LLAMA, "--tp", "2", "--steps", "2", "--json")
    assert status == 0, out + errors
    found = json.loads(out)
    assert found["equal"] and found["problem"] is None and found["warnings"] == []
    rows = {row["pattern"]: row for row in found["modules"]}
    assert rows.keys() >= {
        "model.embed_tokens",
        "model.layers.*",
        "model.layers.*.self_attn.o_proj",
        "model.norm",
        "lm_head",
    }
    projection = rows["model.layers.*.self_attn.q_proj"]
    assert 0 < projection["gradient"] < 1e-4 and 0 < projection["weights"] < 2e-3
    assert 0 < rows["model.layers.*.mlp.down_proj"]["output"] < 1e-4
    losses = [(step["loss"], step["loss_of_one_process"]) for step in found["steps"]]
    assert len(losses) == 2 and losses[0][0] > losses[1][0]
    assert all(abs(own - full) < 1e-4 for own, full in losses)
    assert multiprocessing.active_children() == []


def test_heads_that_a_rule_splits_are_named_with_the_rule(tmp_path: Path) -> None:
    config = rules(
        tmp_path,
        {"patterns": [".*qkv.*"], "partition_type": "column", "shape": [3, -1]},
        {"patterns": [".*proj.weight"], "partition_type": "row"},
    )
    status, out, errors = command(
        "check", f"{CUSTOM}:interleaved", "--tp", "2", "--steps", "1", "--config", config
    )
    assert status == 1, errors
    closing = out[out.index("Language at TP size 2: WRONG: ") :].replace("\n", " ")
    assert "the output of blocks.0.attention.proj differs" in closing
    assert "rule layer_specs[0] from partition_config" in closing
    assert "differs" in out[: out.index("Language at")]
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((LLAMA, "--tp", "1"), "--tp: got 1, expected 2 or more"),
        ((LLAMA, "--tp", "2", "--steps", "0"), "--steps: got 0, expected 1 or more"),
        ((LLAMA, "--tp", "2", "--timeout", "nan"), "--timeout: got nan, expected seconds"),
        ((LLAMA, "--tp", "2", "--dtype", "bf61"), "--dtype"),
        ((LLAMA, "--tp", "2", "--config", "nowhere.json"), "nowhere.json"),
        ((f"{CUSTOM}:takes_text", "--tp", "2"), "the inputs of TakesText are not known"),
        (("lama", "--tp", "2"), "near model types are llama"),
        (
            (f"{CUSTOM}:two_linears", "--tp", "2", "--inputs", f"{CUSTOM}:diverging"),
            "Sequential does not train in one process: its losses are",
        ),
        (
            (f"{CUSTOM}:interleaved", "--tp", "2", "--inputs", f"{CUSTOM}:vectors"),
            "Language does not train in one process: TypeError",
        ),
    ],
)
def test_what_cannot_be_checked_is_said(arguments: tuple[str, ...], words: str) -> None:
    status, _, errors = command("check", *arguments)
    assert status == 2
    assert words in errors and "Traceback" not in errors


def test_a_model_that_cannot_be_sharded_so_is_wrong() -> None:
    status, out, errors = command("check", LLAMA, "--tp", "16", "--json")
    assert status == 1, errors
    assert "16" in json.loads(out)["problem"]
