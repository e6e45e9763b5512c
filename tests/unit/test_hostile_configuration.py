# SPDX-License-Identifier: Apache-2.0
"""Configurations that are made to cost time, memory or the wrong error."""

import base64
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from deepspeed_autotp.base.printable import printable, printable_lines
from deepspeed_autotp.config.load_config import load_ds_config, refuse_misspelt_section
from deepspeed_autotp.config.training_config import TPTrainingConfig, get_tensor_parallel_config
from deepspeed_autotp.config.validation import ConfigProblems
from deepspeed_autotp.interop.configured_model import configured_model
from deepspeed_autotp.interop.layer_counts import check_layer_counts
from deepspeed_autotp.interop.named_model import named_model
from tests.support.autotp_command import command
from tests.support.hostile_values import nested
from tests.support.one_error import check_error, obeyed


def refused(config: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load_ds_config(config)
    return check_error(caught.value)


def section_refused(section: Any) -> str:
    with pytest.raises(ConfigProblems) as caught:
        get_tensor_parallel_config({"tensor_parallel": section})
    return check_error(caught.value)


def test_a_file_of_100_mb_is_refused_by_its_size_at_once(tmp_path: Path) -> None:
    file = tmp_path / "large.json"
    with file.open("wb") as opened:
        opened.truncate(100_000_000)
    start = time.process_time()
    assert "has more than 4194304 bytes" in refused(file)
    assert "has more than 4194304 bytes" in refused("A" * 100_000_000)
    assert time.process_time() - start < 1


def test_a_large_dictionary_is_read_or_refused_in_seconds() -> None:
    words = {f"key_{index}": "x" * 1000 for index in range(100_000)}
    start = time.process_time()
    assert load_ds_config({"x": words})["x"] is words
    text = section_refused(words)
    assert text.startswith("tensor_parallel has 51 problems")
    assert text.endswith("tensor_parallel: and 99950 problems more")
    assert "got {'key_0'" in section_refused({"partition_config": {"layer_specs": words}})
    assert time.process_time() - start < 10


@pytest.mark.parametrize("depth", [101, 900, 100_000])
def test_nesting_without_end_is_one_error(tmp_path: Path, depth: int) -> None:
    file = tmp_path / "deep.json"
    for text in ('{"a":' * depth + "1" + "}" * depth, '{"a":' + "[" * depth + "]" * depth + "}"):
        file.write_text(text)
        assert "nested more than 100 deep" in refused(file)
        assert "nested more than 100 deep" in refused(base64.b64encode(text.encode()).decode())
    assert refused({"a": nested(depth)}).startswith("config: objects and lists are nested more")
    assert "(list)" in section_refused({"autotp_size": nested(depth)})


def test_a_dictionary_that_contains_itself_is_one_error() -> None:
    config: dict[str, Any] = {"tensor_parallel": {"autotp_size": 2}}
    config["tensor_parallel"]["config"] = config
    assert "nested more than 100 deep" in refused(config)
    many: list[Any] = []
    for _ in range(60):  # 2**60 lists, were each counted wherever it is
        many = [many, many]
    load_ds_config({"a": many})


def test_a_key_given_many_times_is_named_in_seconds(tmp_path: Path) -> None:
    file = tmp_path / "twice.json"
    keys = [*range(20_000)] * 2
    file.write_text("{" + ",".join(f'"k{key}": 1' for key in keys) + "}")
    start = time.process_time()
    assert refused(file).endswith("keys given more than once: 'k0', 'k1', 'k2' and 19997 more")
    assert time.process_time() - start < 10


def short(value: Any) -> str:
    """What a case is called."""
    if isinstance(value, int):
        return f"{value.bit_length()} bits"
    return ascii(value[:9]) if isinstance(value, str) else str(value)


SIZES = [math.nan, math.inf, 2.0, 1e308, 10**400, 10**5000, 2**31, -1]


@pytest.mark.parametrize("value", SIZES, ids=short)
@pytest.mark.parametrize("key", ["autotp_size", "tp_grain_size"])
def test_what_is_no_size_is_refused_by_its_key(key: str, value: Any) -> None:
    assert section_refused({key: value}).startswith(f"tensor_parallel.{key}: got ")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", "9" * 5000], ids=short)
def test_what_is_no_number_in_a_file_is_refused_by_its_key(tmp_path: Path, text: str) -> None:
    file = tmp_path / "numbers.json"
    file.write_text('{"tensor_parallel": {"autotp_size": ' + text + "}}")
    try:
        config = load_ds_config(file)
    except ValueError as error:
        assert "Exceeds the limit" in check_error(error)
        return
    assert section_refused(config["tensor_parallel"]).startswith("tensor_parallel.autotp_size: got")


ODD_NAMES = ["\0", "a\0b", "\ud800", "\x1b[2J\x1b[31m", "a\nb\r", "\u202egnp\u2066", "\u200f", ""]


LARGE_NAMES = ["k" * 10_000_000, "\x1b" * 1_000_000]


@pytest.mark.parametrize("name", [*ODD_NAMES, *LARGE_NAMES], ids=short)
def test_a_name_of_any_kind_is_shown_short_and_without_control_characters(name: str) -> None:
    assert "unknown key" in section_refused({name: 1})
    assert section_refused({"preset_model": name}).startswith("tensor_parallel.preset_model: ")
    assert section_refused({"dtype": name}).startswith("tensor_parallel.dtype: ")
    spec: dict[str, Any] = {"patterns": [".*"], "partition_type": name}
    rules = {"layer_specs": [spec]}
    assert "layer_specs[0].partition_type: got" in section_refused({"partition_config": rules})
    assert len(refused(name)) < 3000
    try:
        refuse_misspelt_section({name: {}})
    except ValueError as error:
        check_error(error)


ODD_PATTERNS = ["(" * 60_000, "(" * 100_000, "a" * 100_000, "(" + "\x1b" * 99, "(?P=\x1b)"]


@pytest.mark.parametrize("name", [*ODD_NAMES[:3], *ODD_PATTERNS], ids=short)
def test_a_pattern_of_any_kind_is_shown_short_as_well(name: str) -> None:
    rules = {"layer_specs": [{"patterns": [name, name]}]}
    text = section_refused({"partition_config": rules})
    assert "partition_config.layer_specs[0].patterns[0]: " in text


def test_many_problems_are_said_to_be_many() -> None:
    error = ConfigProblems("x", [f"[{index}]: wrong" for index in range(1000)])
    assert str(error).count("\n") == 51
    assert str(error).endswith("x: and 950 problems more")
    inner = ConfigProblems("y", [f": {error}"])
    assert "\n" not in str(inner)


def test_a_configuration_of_lists_where_dictionaries_are_wanted_is_refused() -> None:
    for section in ([], "x", 3, {"tp": []}, {"partition_config": []}, {3: 4}, {"tp": {3: 4}}):
        section_refused(section)


def test_text_is_printable_and_short() -> None:
    assert printable("caf\u00e9 \U0001f600") == "caf\u00e9 \U0001f600"
    assert printable("a\x1b[31m\n\ud800\u202e") == r"a\x1b[31m\n\ud800\u202e"
    assert len(printable("x" * 10**7)) < 5000
    assert printable_lines("a\n\x07b") == "a\n\\x07b"
    assert printable_lines("\n".join("x" * 300)).endswith("... and 200 more lines")


def test_a_command_prints_no_control_characters(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["\x1b[2J\u202e" * 9]}))
    folder = str(tmp_path)
    for asked in (("plan", folder, "--tp", "2"), ("inspect", f"{folder}/\x1b[2J")):
        status, out, errors = command(*asked)
        assert status == 2
        assert not obeyed(out + errors)


def test_settings_survive_the_largest_sizes() -> None:
    settings = TPTrainingConfig(autotp_size=2**31 - 1, tp_grain_size=2**31 - 1)
    assert settings.autotp_size == settings.tensor_parallel.tp_grain_size == 2**31 - 1


@pytest.mark.parametrize(
    "counts",
    [
        {"num_hidden_layers": 10**9},
        {"n_layer": 10**9},
        {"text_config": {"n_routed_experts": 10**30}},
        {"towers": [{"depth": 100_001}]},
    ],
)
def test_a_model_of_a_billion_layers_is_refused_before_it_is_made(
    tmp_path: Path, counts: dict[str, Any]
) -> None:
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **counts}
    tmp_path.joinpath("config.json").write_text(json.dumps(values))
    start = time.process_time()
    with pytest.raises(ValueError, match="expected at most 100000") as caught:
        configured_model(tmp_path, None)
    check_error(caught.value)
    assert time.process_time() - start < 1


def test_layers_that_are_asked_for_by_name_are_counted() -> None:
    with pytest.raises(ValueError, match="num_hidden_layers is 1000000000, expected at most"):
        named_model("llama:num_hidden_layers=1000000000")


def test_no_size_is_taken_for_a_number_of_layers() -> None:
    sizes = {"vocab_size_per_layer_input": 262_144, "decoder_start_token_id": 10**6}
    check_layer_counts({**sizes, "num_experts": 16_384, "depths": [2, 2]}, "config.json")
