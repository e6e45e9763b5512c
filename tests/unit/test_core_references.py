# SPDX-License-Identifier: Apache-2.0
"""Every function of the compiled core gives back the references and the memory that it takes, also
where it refuses its arguments."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deepspeed_autotp import _core
from tests.support.core_calls import Call, calls, properties, wrong_calls
from tests.support.held_memory import given_out

# `make leaks` calls everything a thousand times.
TIMES = 1000 if os.environ.get("AUTOTP_LEAKS") else 60
CONSTANTS: list[Any] = [None, True, False, (), "", 0, 1, object, ValueError, TypeError]
CONSTANTS += [*_core.Kind, *_core.Source, *(vars(_core)[name] for name in _core.__all__)]


def test_the_table_has_a_call_of_everything() -> None:
    wanted = set()
    for name in set(_core.__all__) - {"Kind", "Source"}:
        value = vars(_core)[name]
        if not isinstance(value, type):
            wanted.add(name)
            continue
        wanted |= {f"{name}.{each}" for each in properties(value)}
        wanted |= {f"{name}.{each}" for each in vars(value) if not each.startswith("__")}
        if "__new__" in vars(value):
            wanted.add(name)
    assert wanted <= {call.covers for call in calls()}


def test_a_call_gives_back_what_it_takes() -> None:
    for call in calls():
        assert not lost(call), str(call)
        assert attempt(call), str(call)


def test_a_refused_call_gives_back_what_it_takes() -> None:
    refused = 0
    for call in calls():
        if call.function is getattr:  # of a property that there is not
            continue
        for wrong in wrong_calls(call):
            assert not lost(wrong), str(wrong)
            refused += not attempt(wrong)
    assert refused > 1000


def attempt(call: Call) -> bool:
    """Whether it does what was asked for."""
    try:
        call.function(*call.args, **call.named)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def lost(call: Call) -> list[str]:
    """What grows, or shrinks, with each call: references to a value, memory. Caches and free lists
    may grow for some hundred calls."""
    watched = [*inside((call.args, call.named)), getattr(call.function, "__self__", None)]
    watched += CONSTANTS
    for _ in range(3):
        attempt(call)
    found: list[str] = []
    for _ in range(8):
        found = growth(call, watched)
        if not found:
            break
    return found


def growth(call: Call, watched: Sequence[Any]) -> list[str]:
    references = list(map(sys.getrefcount, watched))
    memory = given_out()
    for _ in range(TIMES):
        attempt(call)
    now = given_out(), list(map(sys.getrefcount, watched))
    pairs = zip((*memory, *references), (*now[0], *now[1]), strict=True)
    grown = [after - before for before, after in pairs]
    names = ["bytes", "blocks", *(repr(value)[:60] for value in watched)]
    most = [TIMES * 14, *[TIMES * 9 // 10] * (len(names) - 1)]
    return [
        f"{name}: {change} in {TIMES} calls"
        for name, change, limit in zip(names, grown, most, strict=True)
        if abs(change) >= limit
    ]


def inside(value: Any) -> Iterator[Any]:
    """A value and all that it is made of."""
    yield value
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from (key, *inside(each))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from inside(each)
