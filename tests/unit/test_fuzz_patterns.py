# SPDX-License-Identifier: Apache-2.0
"""Patterns that are made to take long end soon, and what they find is what ``re.match`` finds."""

import re
import signal
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed_autotp._core import Pattern
from tests.support.fuzzing import fuzzed

pytestmark = pytest.mark.fuzz

# What one match may take; nominally a hundredth, on a machine that does other things as well.
SECONDS = 1.0

LETTERS = ["a", "b", "\\.", ".", "\\w", "\\d", "[ab]", "[^.]", "\u00e9", "\\u00e9", "(?=a)", "\\b"]
MORE = ["(?!b)", "(?<=a)", "\\1", "(?P=n)", "^", "$", "\\Z", "\\N{DIGIT ONE}", "(?a:\\w)", ""]
REPEATS = ["*", "+", "?", "*?", "+?", "*+", "{2,}", "{,9}", "{,}", "{1,60}", "{30}", ""]
FLAGS = ["", "", "", "(?i)", "(?s)", "(?a)", "(?x)", "(?m)", "(?u)", "(?aims)"]


def _groups(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Groups, alternatives and sequences, each with a repeat."""
    opening = st.sampled_from(["(", "(?:", "(?>", "(?P<n>", "(?i:", "(?a:", "(?-i:", "(?=", "(?!"])
    repeat = st.sampled_from(REPEATS)
    sequence = st.lists(inner, min_size=1, max_size=3).map("".join)
    either = st.lists(sequence, min_size=1, max_size=3).map("|".join)
    return st.builds(lambda start, body, end: f"{start}{body}){end}", opening, either, repeat)


ATOMS = st.builds(str.__add__, st.sampled_from(LETTERS + MORE), st.sampled_from(REPEATS))
PARTS = st.recursive(ATOMS, _groups, max_leaves=8)
PATTERNS = st.builds(
    lambda flags, parts: flags + "".join(parts),
    st.sampled_from(FLAGS),
    st.lists(PARTS, min_size=1, max_size=4),
)
NAMES = st.builds(
    lambda unit, times, end: unit * times + end,
    st.sampled_from(["a", "ab", "a.", "\u00e9", "model.layers.10.", "aab", "0"]),
    st.sampled_from([0, 1, 3, 20, 60, 300, 2000]),
    st.sampled_from(["", "!", "b", "weight", "\n", "\u00e9", "."]),
)


class TooLong(Exception):
    pass


def give_up(*_: object) -> None:
    raise TooLong


def found_by_python(pattern: re.Pattern[str], name: str) -> bool:
    """TooLong after a while of processor time."""
    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.05)
    try:
        return pattern.match(name) is not None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def compiled(pattern: str) -> tuple[Pattern, re.Pattern[str]] | None:
    """None where both refuse the pattern, and where it is one whose end cannot be seen."""
    try:
        python = re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        with pytest.raises(ValueError, match="does not compile"):
            Pattern(pattern)
        return None
    try:
        return Pattern(pattern), python
    except ValueError as error:
        assert "may backtrack without end" in str(error)
        assert "\\N{" in pattern
        return None


@fuzzed(400)
@given(PATTERNS, NAMES)
def test_a_match_ends_soon_and_is_that_of_python(pattern: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = compiled(pattern)
    if both is None:
        return
    ours, python = both
    start = time.thread_time()
    try:
        found = ours.match(name)
    except ValueError as error:
        assert "gave up on" in str(error) and len(str(error)) < 1200
        assert time.thread_time() - start < SECONDS
        return
    assert time.thread_time() - start < SECONDS
    try:
        assert found == found_by_python(python, name)
    except TooLong:
        return


# As people write them.
PIECES = st.sampled_from(
    [
        *["model", "layers", "self_attn", "mlp", "experts", "weight", "bias", "q_proj", "lm_head"],
        *[r"\d+", r"\w+", ".*", ".+?", "[qkv]_proj", "(up|gate|down)_proj", "(?:q|k|v)", r"[^.]+"],
        *[r"h\d*", "(self_attn|cross_attn)", r"\w*norm\w*", "(?P<layer>[0-9]{1,3})"],
    ]
)
USUAL = st.builds(
    lambda start, parts, end: start + r"\.".join(parts) + end,
    st.sampled_from(["", "^", ".*", r".*\.", "(?i)", r"(.*\.)?"]),
    # A group of one name twice is an error of both.
    st.lists(PIECES, min_size=1, max_size=6).filter(lambda parts: "".join(parts).count("?P<") < 2),
    st.sampled_from(["", "$", ".*", r"\.weight$", r"(\.weight|\.bias)?$", r"\Z"]),
)
USUAL_NAMES = st.lists(
    st.sampled_from(
        [
            *["model", "layers", "0", "11", "self_attn", "q_proj", "mlp", "up_proj", "7"],
            *[
                "experts",
                "weight",
                "bias",
                "lm_head",
                "input_layernorm",
                "h",
                "transformer",
                "cross_attn",
            ],
        ]
    ),
    min_size=1,
    max_size=10,
).map(".".join)


@fuzzed(200)
@given(USUAL, USUAL_NAMES)
def test_a_usual_pattern_never_gives_up(pattern: str, name: str) -> None:
    assert Pattern(pattern).match(name) == (re.match(pattern, name) is not None)
