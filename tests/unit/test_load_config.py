# SPDX-License-Identifier: Apache-2.0
"""Reading a configuration: dictionaries, files, base64, and the data type it asks for."""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed_autotp.config.dtypes import infer_config_dtype
from deepspeed_autotp.config.load_config import load_ds_config, switched_on

CONFIG: dict[str, Any] = {"train_batch_size": 8, "tensor_parallel": {"autotp_size": 4}}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def message_of(config: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load_ds_config(config)
    return str(caught.value)


def test_a_dictionary_is_returned_as_it_is() -> None:
    assert load_ds_config(CONFIG) is CONFIG


def test_a_path_may_be_a_string_or_a_path_object(tmp_path: Path) -> None:
    path = write(tmp_path / "ds.json", json.dumps(CONFIG))
    assert load_ds_config(str(path)) == CONFIG
    assert load_ds_config(path) == CONFIG
    assert type(load_ds_config(path)["tensor_parallel"]) is dict


def test_a_file_may_have_comments_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(b'\xef\xbb\xbf{\n  // the degree\n  "train_batch_size": 8,  # global\n}')
    assert load_ds_config(path) == {"train_batch_size": 8}


def test_without_hjson_plain_json_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hjson", None)
    path = write(tmp_path / "ds.json", json.dumps(CONFIG))
    assert load_ds_config(path) == CONFIG
    write(path, '{\n  "train_batch_size": 8,,\n}')
    assert "line 2 column 25" in message_of(path)
    assert repr(str(path)) in message_of(path)


def test_a_key_given_twice_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "ds.json", '{"bf16": {"enabled": true, "enabled": false}}')
    assert message_of(path) == (
        f"cannot read the configuration file {str(path)!r}: keys given more than once: 'enabled'"
    )


def test_two_keys_given_twice_are_both_named(tmp_path: Path) -> None:
    path = write(tmp_path / "ds.json", '{"a": 1, "b": 2, "a": 3, "b": 4, "c": 5}')
    assert message_of(path).endswith("keys given more than once: 'a', 'b'")


def test_a_mistake_in_a_file_is_reported_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "ds.json", '{\n  "bf16": {"enabled": true\n')
    message = message_of(path)
    assert message.startswith(f"cannot read the configuration file {str(path)!r}: ")
    assert "line 3" in message
    assert "\n" not in message


def test_a_file_that_holds_no_object_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "ds.json", "[1, 2]")
    assert message_of(path).endswith("it holds [1, 2] (list), expected a JSON object")


def test_a_directory_and_a_binary_file_are_refused_with_the_reason(tmp_path: Path) -> None:
    assert message_of(str(tmp_path)).endswith("Is a directory")
    path = tmp_path / "weights.bin"
    path.write_bytes(b"{}\xff\xfe")
    assert message_of(str(path)).endswith("it is not text (byte 2 is not UTF-8)")


def test_a_path_object_is_never_read_as_base64(tmp_path: Path) -> None:
    message = message_of(tmp_path / "absent.json")
    assert message == (
        f"cannot read the configuration file {str(tmp_path / 'absent.json')!r}: "
        "No such file or directory"
    )


@pytest.mark.parametrize("encode", [base64.urlsafe_b64encode, base64.b64encode, base64.encodebytes])
def test_base64_of_every_usual_kind_is_read(encode: Any) -> None:
    config = {"note": "\u00ff\u00fe?>~" * 40, **CONFIG}
    text = encode(json.dumps(config, ensure_ascii=False).encode()).decode()
    assert load_ds_config(text) == config


def test_a_missing_file_is_named() -> None:
    assert message_of("ds_config.json") == (
        "cannot read the configuration file 'ds_config.json': there is no such file"
    )


def test_what_is_neither_file_nor_base64_is_called_so() -> None:
    assert message_of("no.base64") == (
        "config: got 'no.base64' (str), expected a dictionary, the path of a JSON file, or JSON in "
        "URL-safe base64; as a path: there is no such file; as base64: it is not base64 "
        "(Only base64 data is allowed)"
    )


def test_base64_without_its_padding_is_refused() -> None:
    text = base64.urlsafe_b64encode(json.dumps({"a": 1}).encode()).decode()
    assert text.endswith("=")
    assert "as base64: it is not base64 (Incorrect padding)" in message_of(text.rstrip("="))


def test_base64_of_something_else_says_what_it_holds() -> None:
    assert "it is not text" in message_of(base64.b64encode(b"\xff\xfe\xfd").decode())
    assert "expected a JSON object" in message_of(base64.b64encode(b"[1]").decode())
    twice = base64.b64encode(b'{"a": 1, "a": 2}').decode()
    assert message_of(twice).endswith("as base64: keys given more than once: 'a'")


def test_long_input_is_shortened_in_the_error() -> None:
    message = message_of("A" * 5001)
    assert len(message) < 400
    assert "'AAAA" in message and "..." in message


@pytest.mark.parametrize(
    ("config", "seen"),
    [(None, "None (NoneType)"), (7, "7 (int)"), (b"{}", "b'{}' (bytes)"), (["a"], "['a'] (list)")],
)
def test_everything_else_is_refused_by_its_type(config: Any, seen: str) -> None:
    assert message_of(config) == (
        f"config: got {seen}, expected a dictionary, the path of a JSON file, or JSON in URL-safe "
        "base64"
    )


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, None),
        ({"bf16": {}}, None),
        ({"bf16": None, "fp16": None}, None),
        ({"bf16": {"enabled": True}}, torch.bfloat16),
        ({"bfloat16": {"enabled": True}}, torch.bfloat16),
        ({"fp16": {"enabled": True}}, torch.float16),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": True}}, torch.float16),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, torch.bfloat16),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, None),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": 1}}, torch.float16),
        ({"fp16": {"enabled": "true"}}, torch.float16),
    ],
)
def test_the_dtype_follows_the_switches(config: dict[str, Any], dtype: torch.dtype | None) -> None:
    assert infer_config_dtype(config) is dtype


def test_a_switch_that_is_neither_true_nor_false_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        switched_on({"bf16": {"enabled": "always"}}, "bf16")
    assert str(caught.value) == "bf16.enabled: got 'always' (str), expected true or false"
    with pytest.raises(ValueError) as caught:
        infer_config_dtype({"fp16": True})
    assert str(caught.value) == "fp16: got True (bool), expected a dictionary"
