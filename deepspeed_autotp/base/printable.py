# SPDX-License-Identifier: Apache-2.0
"""Text of others in messages: no control characters, and not without end.

Names, keys and values come from files, and a message goes to a terminal, which obeys escape codes.
"""

from __future__ import annotations

__all__ = ["one_line", "printable", "printable_lines"]

# A message of so many characters is still read; a name takes some hundred.
_LONGEST = 4000
_MOST_LINES = 100


def printable(text: str, *, longest: int = _LONGEST) -> str:
    """``text`` on one line: control characters and marks of the writing direction as ``repr``
    writes them, and the middle left out where it has more than ``longest`` characters."""
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} ... ({len(text)} characters) ... {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else _escaped(each) for each in text)


def one_line(error: Exception, *, longest: int = _LONGEST) -> str:
    """As :func:`printable` of what ``error`` says, its lines joined; its class where it says
    nothing."""
    return printable(" ".join(str(error).split()) or type(error).__name__, longest=longest)


def printable_lines(text: str) -> str:
    """As :func:`printable` of each line of ``text``; of many lines the first ones."""
    lines = text.split("\n")
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"... and {len(lines) - _MOST_LINES} more lines"]
    return "\n".join(map(printable, lines))


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
