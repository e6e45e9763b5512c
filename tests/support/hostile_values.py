# SPDX-License-Identifier: Apache-2.0
"""Values that nobody expects, and what is left of a valid value after some of it is exchanged."""

import copy
from typing import Any

from hypothesis import strategies as st

_TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            *["", "\0", "\n", "\x1b[31mred\x1b[0m", "\u202eabc\u2066", "\ud800", "a" * 5000],
            *["../../x", "/etc/passwd", "auto", "true", "nan", "1", "column", "(a+)+$", "*"],
        ]
    ),
)
_NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([10**400, 2**31, 2**63, -(2**63), 2**64, 10**19, 10**12]),
    st.floats(),
    st.booleans(),
)
_LEAVES = st.one_of(st.none(), _NUMBERS, _TEXTS)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(_TEXTS, inner, max_size=3),
        inner.map(lambda value: [value] * 3),
    )


VALUES = st.recursive(_LEAVES, _containers, max_leaves=6)
NAMES = _TEXTS


def nested(depth: int) -> Any:
    """A list in a list in a list ..."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def mutated(draw: st.DrawFn, valid: Any, *, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """``valid`` after one change or a few: something is exchanged, left out, added, moved, or has
    another key."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 4)))):
        value = _changed(draw, value, values)
    return value


def _changed(draw: st.DrawFn, value: Any, values: st.SearchStrategy[Any]) -> Any:
    """One change at a random place of ``value``."""
    keys = _keys(value)
    if not keys or draw(st.integers(0, 7)) == 0:
        return draw(values)
    key = draw(st.sampled_from(keys))
    if _keys(value[key]) and draw(st.integers(0, 3)) > 0:
        value[key] = _changed(draw, value[key], values)
        return value
    other = draw(st.sampled_from(keys))
    how = draw(st.sampled_from(("exchange", "leave out", "add", "move", "copy", "number")))
    if how == "leave out":
        del value[key]
    elif how == "add" and isinstance(value, list):
        value.insert(key, draw(values))
    elif how == "add":
        value[draw(NAMES)] = draw(values)
    elif how == "move":
        value[key], value[other] = value[other], value[key]
    elif how == "copy":
        value[key] = copy.deepcopy(value[other])
    elif how == "number" and type(value[key]) is int:
        value[key] += draw(st.sampled_from((-1, 1, 2, 2**31, -(2**63), 2**63)))
    else:
        value[key] = draw(values)
    return value


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []
