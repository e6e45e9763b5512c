# SPDX-License-Identifier: Apache-2.0
"""Pydantic's errors in words of our own, and the types that several sections share.

A message names the key, what was given, what was expected and what to do. All problems of a
section are reported together, one line each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError

from deepspeed_autotp import _core
from deepspeed_autotp.base.printable import printable

__all__ = [
    "ConfigProblems",
    "NonNegative",
    "Positive",
    "dictionary",
    "list_of",
    "nest",
    "problems",
    "shown",
    "unknown_key",
    "wrong",
]

_SHOWN_LENGTH = 60
_MOST_PROBLEMS = 50

# Ranks, grains and dimensions are C integers of 32 bits at least.
_LARGEST = 2**31 - 1

# What pydantic's kinds of errors say about the value that was expected.
_EXPECTED = {
    "int_type": "an integer",
    "greater_than_equal": "an integer of at least {ge}",
    "less_than_equal": "an integer of at most {le}",
    "bool_type": "true or false",
    "string_type": "a string",
    "string_unicode": "a string of valid Unicode",
    "tuple_type": "a list of integers",
}
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")


class ConfigProblems(ValueError):
    """Every problem of one section.

    `lines` read "key: what is wrong", "[index]: what is wrong" in a list, or ": what is wrong" for
    the section itself. They are relative to `where`, so that an enclosing section can put its own
    name in front.
    """

    def __init__(self, where: str, lines: Sequence[str]) -> None:
        if len(lines) > _MOST_PROBLEMS:
            more = len(lines) - _MOST_PROBLEMS
            lines = [*lines[:_MOST_PROBLEMS], f": and {more} problems more"]
        self.where = where
        self.lines = tuple(map(printable, lines))
        # Both arguments go to `args`: an exception crosses process borders by way of them.
        super().__init__(where, self.lines)

    def __str__(self) -> str:
        full = nest(self.where, self.lines)
        if len(full) == 1:
            return full[0]
        return "\n  ".join([f"{self.where} has {len(full)} problems:", *full])


def nest(where: str, lines: Sequence[str]) -> list[str]:
    """The same lines, seen from the section that encloses `where`."""
    return [f"{where}{line}" if line[0] in ":[" else f"{where}.{line}" for line in lines]


def problems(error: ValidationError, known: Sequence[str] = ()) -> list[str]:
    """The lines of a ConfigProblems; `known` are the keys of the section."""
    lines: list[str] = []
    for problem in error.errors(include_url=False):
        path = "".join(f"[{part}]" if isinstance(part, int) else part for part in problem["loc"])
        kind, given, context = problem["type"], problem["input"], problem.get("ctx", {})
        cause = context.get("error")
        if isinstance(cause, ConfigProblems):
            lines += nest(path, cause.lines)
        elif cause is not None:  # the core names the key itself
            text = str(cause)
            lines.append(text if text.startswith(f"{path}: ") else f"{path}: {text}")
        elif kind in _UNKNOWN_KEY:
            lines.append(f"{path}: {unknown_key(path, known)}")
        elif kind == "missing":
            lines.append(f"{path}: is missing and has no default; write it")
        else:
            # What is not listed is said in pydantic's words.
            words = problem["msg"].removeprefix("Input should be ")
            expected = _EXPECTED.get(kind, words).format(**context)
            lines.append(f"{path}: {wrong(given, expected)}")
    return lines


def unknown_key(key: str, known: Sequence[str]) -> str:
    """What is wrong about a key that is none of `known`, naming the nearest of them."""
    near = " or ".join(f"'{name}'" for name in _core.nearest(key, known))
    return (
        f"unknown key; did you mean {near}?" if near else f"unknown key; known: {', '.join(known)}"
    )


def shown(value: object) -> str:
    """A value and its type on one line, shortened: `'four' (str)`."""
    text = printable(" ".join(_represented(value).split()))
    if len(text) > _SHOWN_LENGTH:
        text = text[: _SHOWN_LENGTH - 3] + "..."
    return f"{text} ({type(value).__name__})"


def _represented(value: object) -> str:
    if isinstance(value, str | bytes):
        return repr(value[:_SHOWN_LENGTH])
    try:
        return repr(value)
    except RecursionError:
        return "nested without end"
    except ValueError:  # of an integer with more digits than Python writes
        return "an integer of thousands of digits"


def wrong(value: object, expected: str) -> ValueError:
    """The error for a value that is not what was expected; to be raised."""
    return ValueError(f"got {shown(value)}, expected {expected}")


def dictionary(value: object, where: str) -> dict[str, Any]:
    """A copy of a dictionary with strings as keys; ConfigProblems of `where` for anything else."""
    if not isinstance(value, Mapping):
        raise ConfigProblems(where, [f": {wrong(value, 'a dictionary')}"])
    for key in value:
        if not isinstance(key, str):
            text = f"got a dictionary with the key {shown(key)}, expected strings as keys"
            raise ConfigProblems(where, [f": {text}"])
    return dict(value)


def _integer(minimum: int) -> BeforeValidator:
    """One message for a wrong type and a wrong size; true and false are no integers."""

    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise wrong(value, f"an integer of at least {minimum}")
        if value > _LARGEST:
            raise wrong(value, f"an integer of at most {_LARGEST}")
        return value

    return BeforeValidator(check)


def list_of(what: str) -> BeforeValidator:
    """A list or tuple; a single string is told to become one."""

    def check(value: object) -> list[object]:
        if isinstance(value, str):
            raise ValueError(f"{wrong(value, f'a list of {what}')}; write [{value!r}]")
        if not isinstance(value, list | tuple):
            raise wrong(value, f"a list of {what}")
        return list(value)

    return BeforeValidator(check)


NonNegative = Annotated[int, _integer(0)]
Positive = Annotated[int, _integer(1)]
