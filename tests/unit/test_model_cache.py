# SPDX-License-Identifier: Apache-2.0
"""Records of models in the cache: what is read from one is what the model itself gives."""

import gzip
import json
import logging
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepspeed_autotp.estimate import live_model, model_cache
from deepspeed_autotp.estimate.changes import Changes
from deepspeed_autotp.estimate.model_cache import ModelCache
from deepspeed_autotp.estimate.subject import Subject
from tests.support.autotp_command import command

_SIZES = "hidden_size=64,intermediate_size=96,num_attention_heads=8,num_key_value_heads=2"
LLAMA = f"llama:num_hidden_layers=3,{_SIZES},vocab_size=101"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
SETTINGS = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
TENSOR_PARALLEL = {"tp_grain_size": 16, "vocab_parallel_lm_head": False}
RULES = {
    "layer_specs": [
        {"patterns": [".*(up|gate)_proj"], "partition_type": "column"},
        {"patterns": [".*down_proj"], "partition_type": "row"},
        {"patterns": [".*self_attn"], "partition_type": "skip"},
    ]
}


class Counted:
    """How often a model is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        made = live_model.LiveModel.__init__

        def count(model: live_model.LiveModel, text: str, changes: Changes) -> None:
            self.times += 1
            made(model, text, changes)

        monkeypatch.setattr(live_model.LiveModel, "__init__", count)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Of the records."""
    monkeypatch.setenv("AUTOTP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def configured(folder: Path, **section: Any) -> str:
    """The name of a DeepSpeed configuration."""
    file = folder / "ds.json"
    file.write_text(json.dumps({**SETTINGS, "tensor_parallel": {**TENSOR_PARALLEL, **section}}))
    return str(file)


def output(*arguments: str) -> str:
    status, out, errors = command(*arguments)
    assert (status, errors) == (0, "")
    return out


def without_cache(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    with monkeypatch.context() as context:
        context.setenv("AUTOTP_CACHE", "off")
        return output(*arguments)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (LLAMA, ()),
        (f"mixtral:num_hidden_layers=2,{_SIZES},num_local_experts=4", ("--dtype", "bf16")),
        (LLAMA, ("--lora", "r=4", "--gradient-checkpointing", "--dtype", "fp16")),
        ("t5:d_model=64,d_ff=96,num_layers=2,num_heads=8,d_kv=8", ("--gradient-checkpointing",)),
        ("gpt2:n_layer=2,n_embd=64,n_head=4", ()),
        ("a folder", ()),
    ],
)
def test_what_is_read_is_what_the_model_gives(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    made: Counted,
    tmp_path: Path,
    model: str,
    options: tuple[str, ...],
) -> None:
    if model == "a folder":
        from transformers import Gemma2Config

        saved = Gemma2Config(num_hidden_layers=2, hidden_size=64, architectures=["Gemma2Model"])
        saved.save_pretrained(model := str(tmp_path / "gemma2"))
    config = configured(tmp_path)
    asked = [
        ("plan", model, "--json", "--tp", "2", *options),
        ("plan", model, "--json", "--tp", "4", "--dp", "8", "--zero", "1", *options),
        ("plan", model, "--tp", "2", "--optimizer", "sgd", "--bandwidth", "1GB/s", *options),
        ("plan", model, "--json", "--tp", "2", "--config", config, "--dtype", "bf16"),
    ]
    if model.startswith("llama") and not options:
        asked.append(("explain", model, Q_PROJ, "--tp", "2"))
    expected = [without_cache(monkeypatch, *arguments) for arguments in asked]
    made.times = 0
    assert [output(*arguments) for arguments in asked] == expected
    first = made.times
    assert first == len(list(folder.iterdir())) <= 2
    assert [output(*arguments) for arguments in asked] == expected
    assert made.times == first


def test_a_trace_makes_the_model_again_and_is_the_same(
    monkeypatch: pytest.MonkeyPatch, folder: Path, made: Counted
) -> None:
    traced = ("plan", LLAMA, "--json", "--tp", "2", "--seq", "32")
    expected = json.loads(without_cache(monkeypatch, *traced))
    output("plan", LLAMA, "--tp", "2")
    made.times = 0
    found = json.loads(output(*traced))
    assert made.times == 1
    for each in (expected, found):
        assert each["activations"]["source"] == "traced"
        each["activations"].pop("seconds")
    assert found == expected


def test_errors_are_those_of_the_model(folder: Path, made: Counted) -> None:
    wrong = ("plan", "llama:num_attention_heads=4", "--tp", "8")
    first, second = command(*wrong), command(*wrong)
    assert first == second and first[0] == 2 and "heads" in first[2]
    assert made.times == 1
    for _ in range(2):
        status, _, errors = command("plan", "llama:hidden_sise=8", "--tp", "2")
        assert status == 2 and "near names are hidden_size" in errors
    assert made.times == 3


def test_the_record_is_another_one_where_what_it_is_made_of_changes(
    monkeypatch: pytest.MonkeyPatch, folder: Path, made: Counted, tmp_path: Path
) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=1, hidden_size=64, architectures=["LlamaForCausalLM"])
    text = str(tmp_path / "llama")

    def sizes(*options: str) -> tuple[int, int]:
        """Times that it was made since the last call, and bytes of the model."""
        made.times = 0
        found = json.loads(output("plan", text, "--json", "--tp", "2", *options))
        return made.times, found["bytes"]

    config.save_pretrained(text)
    (_, full), again = sizes(), sizes()
    assert again == (0, full)
    assert sizes("--dtype", "bf16") == (1, full // 2)
    assert sizes("--dtype", "bfloat16") == (0, full // 2)
    assert sizes("--lora", "r=4")[0] == sizes("--gradient-checkpointing")[0] == 1
    config.num_hidden_layers = 2
    config.save_pretrained(text)
    times, larger = sizes()
    assert times == 1 and larger > full
    versions = model_cache.installed()
    assert any(each.startswith("transformers-") for each in versions)
    assert sizes() == (0, larger)
    monkeypatch.setattr(model_cache, "installed", lambda: [*versions, "timm-1.0.dist-info"])
    assert sizes() == (1, larger)
    # A file of the package, of transformers or of PEFT that is changed in its place.
    assert sizes() == (0, larger)
    monkeypatch.setattr(model_cache, "stamp_of", lambda path: (path, 1, 1))
    assert sizes() == (1, larger)


def test_a_model_that_code_of_the_user_makes_is_not_kept(folder: Path, made: Counted) -> None:
    for _ in range(2):
        output("plan", "tests.support.check_models:interleaved", "--tp", "2")
    assert made.times == 2 and not folder.exists()


def _rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def rewrite(data: bytes) -> bytes:
        content = json.loads(gzip.decompress(data))
        change(content)
        return gzip.compress(json.dumps(content).encode())

    return rewrite


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "a byte": lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
    "no gzip": lambda data: b"{}",
    "not deflated": lambda data: data[:10] + zlib.compress(b"{}"),
    "no JSON": lambda data: gzip.compress(b"\x80\x04."),
    "of another version": _rewritten(lambda content: content.update(version=2)),
    "of another model": _rewritten(lambda content: content.update(key="0" * 64)),
    "no integer": _rewritten(lambda content: content["model"]["data"].update(output_head="1")),
    "no such module": _rewritten(lambda content: content["model"]["data"].update(output_head=999)),
    "too few flags": _rewritten(lambda content: content["model"]["trains"].pop()),
    "no kind": _rewritten(lambda content: content["model"]["stacks"]["model.layers"].append("")),
}


def test_a_damaged_file_is_made_anew(folder: Path, made: Counted) -> None:
    asked = ("plan", LLAMA, "--json", "--tp", "2")
    expected = output(*asked)
    (file,) = folder.iterdir()
    right = file.read_bytes()
    for what, damage in DAMAGED.items():
        file.write_bytes(damage(right))
        made.times = 0
        assert output(*asked) == expected, what
        assert made.times == 1, what
        assert file.read_bytes() == right, what
    assert (file.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_file_of_another_user_is_not_read(
    monkeypatch: pytest.MonkeyPatch, folder: Path, made: Counted
) -> None:
    output("plan", LLAMA, "--tp", "2")
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    output("plan", LLAMA, "--tp", "2")
    assert made.times == 2


def test_a_folder_that_cannot_be_written_is_done_without(
    monkeypatch: pytest.MonkeyPatch,
    made: Counted,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = ("plan", LLAMA, "--json", "--tp", "2")
    expected = without_cache(monkeypatch, *asked)
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOTP_CACHE", str(tmp_path / "file"))
    caplog.set_level(logging.DEBUG, "deepspeed_autotp")
    made.times = 0
    assert output(*asked) == output(*asked) == expected
    assert made.times == 2
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    assert any("is not written: " in line for line in said)


def test_what_would_not_come_back_is_not_kept(tmp_path: Path) -> None:
    record = Subject(LLAMA, {}, Changes()).record
    entry = ModelCache(tmp_path).entry(LLAMA + ",vocab_size=101" * 300, Changes())
    entry.write(replace(record, stacks={"\ud800": (" A []",)}))
    assert entry.read() is None
    entry.write(record)
    assert entry.read() == record


def test_the_last_ones_that_were_used_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(model_cache, "_KEPT", 2)
    cache, record = ModelCache(tmp_path), Subject(LLAMA, {}, Changes()).record
    notes, left = tmp_path / "notes.json.gz", tmp_path / ".autotp-saving-1"
    for file in (notes, left):
        file.touch()
        os.utime(file, (1, 1))
    files = []
    for age, text in enumerate(("a", "b", "c", "d")):
        entry = cache.entry(text, Changes())
        entry.write(record)
        file = max(tmp_path.glob("*.gz"), key=lambda each: each.stat().st_mtime_ns)
        os.utime(file, (10 + age, 10 + age))
        if text == "b":
            cache.entry("a", Changes()).read()  # which makes it the newest
        files.append(file)
    assert {file.exists() for file in (files[0], files[3], notes)} == {True}
    assert not any(file.exists() for file in (files[1], files[2], left))


@pytest.mark.parametrize("value", ["of", "cache/here", ""])
def test_another_value_of_the_variable_is_said(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("AUTOTP_CACHE", value)
    status, _, errors = command("plan", LLAMA, "--tp", "2")
    assert status == 2
    assert f"AUTOTP_CACHE: got {value!r}, expected the absolute path of a folder, or off" in errors


def test_the_folder_is_that_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AUTOTP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    output("plan", LLAMA, "--tp", "2")
    assert len(list((tmp_path / "deepspeed_autotp" / "models").iterdir())) == 1


WARM = """
import json, sys, time
sys.path[:] = {path!r}
from deepspeed_autotp.cli.main import main
for arguments in {arguments!r}:
    assert main(arguments) == 0
heavy = [name for name in ("torch", "transformers", "peft", "deepspeed", "numpy")
         if name in sys.modules]
warm = time.process_time()
import torch
print(json.dumps([heavy, warm, time.process_time() - warm]), file=sys.stderr)
"""


def test_a_plan_of_a_known_model_imports_no_torch(folder: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, partition_config=RULES)
    asked = [
        ["plan", LLAMA, "--tp", "2", "--dtype", "bf16"],
        ["plan", LLAMA, "--tp", "4", "--dtype", "bf16", "--json", "--config", config],
        ["plan", LLAMA, "--tp", "2", "--dtype", "bf16", "--html", str(tmp_path / "plan.html")],
        ["explain", LLAMA, Q_PROJ, "--tp", "2", "--dtype", "bf16"],
    ]
    expected = "".join(output(*arguments) for arguments in asked)
    script = WARM.format(path=sys.path, arguments=asked)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == expected
    heavy, warm, torch = json.loads(done.stderr)
    assert heavy == []
    assert warm < torch, f"{warm:.2f} s for all of it, {torch:.2f} s for torch"
