# SPDX-License-Identifier: Apache-2.0
"""JSON of others: whatever is wrong with it is one ValueError."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from deepspeed_autotp.base.nested_values import held_values, is_container
from deepspeed_autotp.base.printable import printable

__all__ = [
    "parsed_json",
    "read_json",
    "read_text",
    "refuse_lone_surrogates",
    "refuse_nesting",
    "without_duplicates",
]

# Of objects and lists in each other. Whoever copies or prints them calls itself for each.
_DEEPEST = 100
_NAMED = 3
_AT_MOST = "which are at most expected"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(file: Path, *, largest: int, allow_nan: bool = False) -> Any:
    """What ``file`` holds. Errors as of :func:`read_text` and :func:`parsed_json`."""
    return parsed_json(read_text(file, largest=largest), allow_nan=allow_nan)


def read_text(
    file: Path, *, largest: int, encoding: str = "utf-8", expected: str = _AT_MOST
) -> str:
    """The text of ``file``. ValueError, which ends with
    ``expected``, for more than ``largest`` bytes; OSError where it cannot be read."""
    with file.open("rb") as opened:
        data = opened.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"it has more than {largest} bytes, {expected}")
    return data.decode(encoding)


def parsed_json(text: str, *, allow_nan: bool = False) -> Any:
    """What ``text`` is. ValueError for what is no JSON, for a key that an object has twice, for
    half a character, for objects in each other without end, and for NaN and infinities, which
    Python writes, unless ``allow_nan``."""
    constant = None if allow_nan else _refuse_constant
    try:
        value = json.loads(text, object_pairs_hook=without_duplicates, parse_constant=constant)
    except RecursionError:
        raise _too_deep() from None
    refuse_nesting(value)
    if _SURROGATE.search(text):
        refuse_lone_surrogates(value)
    return value


def refuse_nesting(value: object) -> None:
    """ValueError for dictionaries and lists that are nested deeper than any configuration, which
    those are that contain themselves."""
    level = {id(value): value}  # each once, in however many places it is
    for _ in range(_DEEPEST):
        level = {
            id(held): held
            for each in level.values()
            for held in held_values(each)
            if is_container(held)
        }
        if not level:
            return
    raise _too_deep()


def without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError naming the keys that it has twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        named = ", ".join(printable(repr(key), longest=100) for key in twice[:_NAMED])
        more = f" and {len(twice) - _NAMED} more" if len(twice) > _NAMED else ""
        raise ValueError(f"keys given more than once: {named}{more}")
    return found


def refuse_lone_surrogates(value: object) -> None:
    """ValueError for text that no file can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("it holds a lone surrogate, which is half a character") from None


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}, which JSON does not have")


def _too_deep() -> ValueError:
    return ValueError(f"objects and lists are nested more than {_DEEPEST} deep")
