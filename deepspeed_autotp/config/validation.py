# SPDX-License-Identifier: Apache-2.0
"""What a configuration value has to be, and the words for one that is not.

A check takes the value alone and raises ValueError without naming the key; whoever knows the
key adds it. All problems of a section are reported together, one line each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from deepspeed_autotp import _core

__all__ = [
    "Check",
    "ConfigProblems",
    "check_all",
    "dictionary",
    "flag",
    "integer",
    "nest",
    "sequence",
    "shown",
    "strings",
    "unknown_keys",
    "wrong",
]

Check = Callable[[object], Any]

_SHOWN_LENGTH = 60

# Ranks, grains and dimensions are C integers of 32 bits at least.
_LARGEST = 2**31 - 1


class ConfigProblems(ValueError):
    """Every problem of one section.

    `lines` read "key: what is wrong", or ": what is wrong" for the section as a whole. They are
    relative to `where`, so that an enclosing section can put its own name in front.
    """

    def __init__(self, where: str, lines: Sequence[str]) -> None:
        # Both arguments go to `args`: an exception crosses process borders by way of them.
        super().__init__(where, tuple(lines))
        self.where = where
        self.lines = tuple(lines)

    def __str__(self) -> str:
        full = nest(self.where, self.lines)
        if len(full) == 1:
            return full[0]
        return "\n  ".join([f"{self.where} has {len(full)} problems:", *full])


def nest(where: str, lines: Sequence[str]) -> list[str]:
    """The same lines, seen from the section that encloses `where`."""
    return [f"{where}{line}" if line.startswith(":") else f"{where}.{line}" for line in lines]


def shown(value: object) -> str:
    """A value and its type on one line, shortened: `'four' (str)`."""
    text = " ".join(repr(value).split())
    if len(text) > _SHOWN_LENGTH:
        text = text[: _SHOWN_LENGTH - 3] + "..."
    return f"{text} ({type(value).__name__})"


def wrong(value: object, expected: str) -> ValueError:
    """The error for a value that is not what was expected; to be raised."""
    return ValueError(f"got {shown(value)}, expected {expected}")


def check_all(values: MutableMapping[str, Any], checks: Mapping[str, Check]) -> list[str]:
    """Replace each value by what its check returns; a line for each that fails."""
    lines: list[str] = []
    for key, check in checks.items():
        try:
            values[key] = check(values[key])
        except ConfigProblems as error:
            lines += error.lines
        except ValueError as error:
            lines.append(f"{key}: {error}")
    return lines


def integer(minimum: int) -> Callable[[object], int]:
    """A check for integers of at least `minimum`; true and false are no integers."""

    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise wrong(value, f"an integer of at least {minimum}")
        if value > _LARGEST:
            raise wrong(value, f"an integer of at most {_LARGEST}")
        return value

    return check


def flag(value: object) -> bool:
    """A check for true or false, and nothing that merely counts as one of them."""
    if not isinstance(value, bool):
        raise wrong(value, "true or false")
    return value


def sequence(value: object, of: str) -> list[object]:
    """A check for a list or tuple; a lone string is told to become one."""
    if isinstance(value, str):
        raise ValueError(f"got {shown(value)}, expected a list of {of}; write [{value!r}]")
    if not isinstance(value, list | tuple):
        raise wrong(value, f"a list of {of}")
    return list(value)


def strings(of: str) -> Callable[[object], list[str]]:
    """A check for a list of strings, which are called `of` in the error."""

    def check(value: object) -> list[str]:
        found: list[str] = []
        for item in sequence(value, of):
            if not isinstance(item, str):
                raise ValueError(f"got a list with {shown(item)}, expected a list of {of}")
            found.append(item)
        return found

    return check


def dictionary(value: object) -> dict[str, Any]:
    """A check for a dictionary with strings as keys."""
    if not isinstance(value, Mapping):
        raise wrong(value, "a dictionary")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(
                f"got a dictionary with the key {shown(key)}, expected strings as keys"
            )
    return dict(value)


def unknown_keys(keys: Iterable[str], known: Sequence[str]) -> list[str]:
    """One line for each key that is not among `known`, naming the nearest."""
    lines = []
    for key in keys:
        if key not in known:
            near = _core.nearest(key, known)
            names = " or ".join(f"'{name}'" for name in near)
            hint = f"did you mean {names}?" if near else f"known: {', '.join(known)}"
            lines.append(f"{key}: unknown key; {hint}")
    return lines
