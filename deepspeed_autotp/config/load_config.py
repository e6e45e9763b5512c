# SPDX-License-Identifier: Apache-2.0
"""A DeepSpeed configuration from a dictionary, a file or base64."""

from __future__ import annotations

import base64
import binascii
import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deepspeed_autotp import _core
from deepspeed_autotp.config.validation import dictionary, shown, wrong

__all__ = ["load_ds_config", "precision_switches", "refuse_misspelt_section", "switched_on"]

# Sections of DeepSpeed with a name like ours.
_OTHER_SECTIONS = ("expert_parallel",)
_EXPECTED = "a dictionary, the path of a JSON file, or JSON in URL-safe base64"


def load_ds_config(config: str | dict[str, Any] | os.PathLike[str]) -> dict[str, Any]:
    """The configuration as a dictionary; a dictionary is returned as it is.

    A string is a path if something is there, else base64. Where hjson is installed, as it is
    with DeepSpeed, a file may have comments. Raises ValueError with what was given and why it
    could not be read.
    """
    if isinstance(config, dict):
        return config
    if not isinstance(config, str | os.PathLike):
        raise ValueError(f"config: {wrong(config, _EXPECTED)}")
    path = os.fspath(config)
    try:
        if not isinstance(config, str) or os.path.exists(path):
            return _parse(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the configuration file {path!r}: {_reason(error)}") from None
    if path.endswith((".json", ".hjson")):
        raise ValueError(f"cannot read the configuration file {path!r}: there is no such file")
    try:
        return _parse(_decode(config))
    except ValueError as error:
        raise ValueError(
            f"config: got {shown(config)}, expected {_EXPECTED}; as a path: there is no such file; "
            f"as base64: {_reason(error)}"
        ) from None


def precision_switches(config: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether bf16, under either of its names, and fp16 are enabled."""
    bf16 = "bf16" if "bf16" in config else "bfloat16"
    return switched_on(config, bf16), switched_on(config, "fp16")


def switched_on(config: Mapping[str, Any], key: str) -> bool:
    """Whether a section such as "bf16" is enabled, read as DeepSpeed reads it.

    1 and "true" count as true, "auto" as false; ValueError for what is neither true nor false.
    """
    section = config.get(key)
    if section is None:
        return False
    value = dictionary(section, key).get("enabled", False)
    if value == "auto":
        return False
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise ValueError(f"{key}.enabled: {wrong(value, 'true or false')}") from None


def refuse_misspelt_section(ds_config: Mapping[str, Any]) -> None:
    """ValueError for a configuration whose only such section has a slip in its name."""
    ours = "tensor_parallel"
    for key in ds_config if ds_config.get(ours) is None else ():
        if key in _OTHER_SECTIONS:
            continue
        near = isinstance(key, str) and _core.nearest(key, [ours])
        # A part of the name, as ``tensor``, is another word.
        if near and abs(len(key) - len(ours)) <= len(ours) // 3:
            raise ValueError(f"Unknown config section {key!r}. Did you mean {ours!r}?")


def _decode(text: str) -> str:
    """Base64 of either alphabet, in one line or several, as text."""
    plain = "".join(text.split()).translate(str.maketrans("-_", "+/"))
    return base64.b64decode(plain, validate=True).decode("utf-8")


def _parse(text: str) -> dict[str, Any]:
    """A JSON object; ValueError with the place of the mistake, or with a key given twice."""
    value = _parser()(text, object_pairs_hook=_without_duplicates)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {shown(value)}, expected a JSON object")
    return value


def _parser() -> Callable[..., Any]:
    try:
        loads: Callable[..., Any] = importlib.import_module("hjson").loads
    except ImportError:
        return json.loads
    return loads


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = [repr(key) for key in found if keys.count(key) > 1]
        raise ValueError(f"keys given more than once: {', '.join(twice)}")
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"it is not text (byte {error.start} is not UTF-8)"
    if isinstance(error, binascii.Error):
        return f"it is not base64 ({error})"
    return " ".join(str(error).split())
