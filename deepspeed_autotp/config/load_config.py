# SPDX-License-Identifier: Apache-2.0
"""A DeepSpeed configuration from a dictionary, a file or base64."""

from __future__ import annotations

import base64
import binascii
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deepspeed_autotp import _core
from deepspeed_autotp.base.printable import one_line, printable
from deepspeed_autotp.config.json_text import (
    parsed_json,
    read_text,
    refuse_lone_surrogates,
    refuse_nesting,
    without_duplicates,
)
from deepspeed_autotp.config.validation import ConfigProblems, dictionary, shown, wrong

__all__ = [
    "load_ds_config",
    "precision_switches",
    "refuse_expert_parallel",
    "refuse_misspelt_section",
    "switched_on",
]

# Sections of DeepSpeed with a name like ours.
_OTHER_SECTIONS = ("expert_parallel",)
_EXPECTED = "a dictionary, the path of a JSON file, or JSON in URL-safe base64"
# A configuration with rules for each layer of a large model has some hundred kilobytes.
_LARGEST = 4 * 2**20
_NEEDED = "which no configuration needs"
_LONGEST_PATH = 1000


def load_ds_config(config: str | dict[str, Any] | os.PathLike[str]) -> dict[str, Any]:
    """The configuration as a dictionary; a dictionary is returned as it is.

    A string is a path if something is there, else base64. Where hjson is installed, as it is
    with DeepSpeed, a file may have comments. Raises ValueError with what was given and why it
    could not be read.
    """
    if isinstance(config, dict):
        try:
            refuse_nesting(config)
        except ValueError as error:
            raise ConfigProblems("config", [f": {error}"]) from None
        return config
    if not isinstance(config, str | os.PathLike):
        raise ValueError(f"config: {wrong(config, _EXPECTED)}")
    path = os.fspath(config)
    named = printable(repr(path), longest=_LONGEST_PATH)
    try:
        if not isinstance(config, str) or _exists(path):
            return _parse(
                read_text(Path(path), largest=_LARGEST, encoding="utf-8-sig", expected=_NEEDED)
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the configuration file {named}: {_reason(error)}") from None
    if path.endswith((".json", ".hjson")):
        raise ValueError(f"cannot read the configuration file {named}: there is no such file")
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


def _exists(path: str) -> bool:
    """Whether something is at ``path``; what no file can be called is nowhere."""
    try:
        return os.path.exists(path)
    except ValueError:  # of a null character, or a lone surrogate
        return False


def refuse_expert_parallel(config: Mapping[str, Any], *, called: str) -> None:
    """ValueError for ``called``, which would show experts as tensor parallelism alone shards them,
    where DeepSpeed's AutoEP is to split them."""
    if switched_on(config, "expert_parallel"):
        raise ValueError(
            f"{called}: the configuration has expert_parallel.enabled true, expected no such "
            "section: DeepSpeed's AutoEP splits the experts when the engine starts, over ranks "
            f"that {called} does not have; leave it out to see the rest of the model, and experts "
            "as they are sharded without it"
        )


def _decode(text: str) -> str:
    """Base64 of either alphabet, in one line or several, as text."""
    if len(text) > 2 * _LARGEST:
        raise ValueError(f"it has more than {_LARGEST} bytes, {_NEEDED}")
    plain = "".join(text.split()).translate(str.maketrans("-_", "+/"))
    return base64.b64decode(plain, validate=True).decode("utf-8")


def _parse(text: str) -> dict[str, Any]:
    """A JSON object; ValueError with the place of the mistake, or with a key given twice."""
    if not text.strip():  # which hjson takes for an empty object
        raise ValueError("it is empty")
    try:
        value = parsed_json(text, allow_nan=True)  # which the section refuses by its key
    except ValueError as error:
        value = _with_comments(text, error)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {shown(value)}, expected a JSON object")
    return value


def _with_comments(text: str, error: ValueError) -> Any:
    """What is JSON with comments, where hjson is installed; ``error`` says what plain JSON has
    against it."""
    try:
        hjson = importlib.import_module("hjson")
    except ImportError:
        raise error from None
    try:
        value = hjson.loads(text, object_pairs_hook=without_duplicates)
        refuse_nesting(value)
        refuse_lone_surrogates(value)
    except (RecursionError, OverflowError):  # of numbers beyond those of float
        raise error from None
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"it is not text (byte {error.start} is not UTF-8)"
    if isinstance(error, binascii.Error):
        return f"it is not base64 ({error})"
    return one_line(error)
