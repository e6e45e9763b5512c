# SPDX-License-Identifier: Apache-2.0
"""Patterns have exactly the results of ``re.match``."""

import re
import signal
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_autotp._core import Pattern, preset_names, preset_rows

# A byte of flags, a pattern, a line feed, a name.
CORPUS = Path(__file__).resolve().parents[1] / "core" / "fuzz" / "corpus" / "regex.hex"

NAMES = [
    "",
    "lm_head.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.11.mlp.experts.3.down_proj",
    "transformer.h.2.attn.c_attn.bias",
    "a\nb",
    "weight\n",
    "\n",
    "Stra\u00dfe.\u0130.weight",
    "caf\u00e9 \U0001f600",
    "a\0b",
    "\x1c\x85\u2028",
]

ATOMS = st.sampled_from(
    [
        *["a", "b", "0", "_", "-", " ", ".", "\\.", "\\d", "\\D", "\\w", "\\W", "\\s", "\\S"],
        *["\\b", "\\B", "\\A", "\\Z", "^", "$", "\\n", "\\t", "\\x41", "\\\\", "\\/", "\\-"],
        *["[abc]", "[^abc]", "[a-z0-9_]", "[\\d.]", "[^\\W]", "[]a]", "[^]a]", "[-a]", "[a-]"],
        *["[[:alpha:]]", "[a&&b]", "[.]", "[\\]]", "[\\b]", "weight", "layers", "q_proj"],
        *["(?=a)", "(?!a)", "(?<=a)", "(?<!a)", "(?i:A)", "(?s:.)", "(?m:^)", "(?a:\\w)"],
        *["(?#x)", "(?P<n>a)", "\\1", "(?P=n)", "(?(1)a|b)", "\u00e9", "\\u00e9", "\\N{DIGIT ONE}"],
        *["\\Q", "\\E", "\\K", "\\G", "\\R", "\\h", "\\x{41}", "\\N", "\\C", "\\z", "\\0", "#"],
    ]
)
REPEATS = st.sampled_from(
    ["", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,2}", "{1,}", "{", "{a}", "*+"]
)


def repeated(pattern: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(lambda body, repeat: body + repeat, pattern, REPEATS)


def grouped(pattern: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """One more level of groups, alternatives and sequences."""
    opening = st.sampled_from(["(", "(?:", "(?>"])
    sequences = st.lists(pattern, min_size=1, max_size=3).map("".join)
    alternatives = st.lists(sequences, min_size=1, max_size=3).map("|".join)
    return st.one_of(
        repeated(st.builds(lambda start, body: f"{start}{body})", opening, alternatives)),
        alternatives,
    )


LEAVES = repeated(ATOMS)
PATTERNS = st.lists(st.one_of(LEAVES, grouped(LEAVES)), max_size=5).map("".join)
SUBJECTS = st.one_of(
    st.sampled_from(NAMES),
    st.text(alphabet="ab0_-. Aweightlayrs\n\u00e9\u0660", max_size=12),
)


# Repeats of a group, in which Python may be lucky with the first of very many ways.
NESTED = re.compile(r"\)[*+{]")


class TooLong(Exception):
    pass


def give_up(*_: object) -> None:
    raise TooLong


def matches_in_python(pattern: str, subject: str) -> bool:
    """TooLong after a second of processor time: re tries every way through nested repeats."""
    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1.0)
    try:
        return re.match(pattern, subject) is not None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def agree(pattern: str, subject: str) -> None:
    """Pattern and re accept the same patterns, and those match the same names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # re warns of patterns whose meaning may change
        start = time.thread_time()
        try:
            expected = matches_in_python(pattern, subject)
        except TooLong:
            return
        except (re.error, OverflowError):
            with pytest.raises(ValueError, match="does not compile"):
                Pattern(pattern)
            return
        seconds = time.thread_time() - start
        try:
            assert Pattern(pattern).match(subject) == expected
        except ValueError as error:
            is_unseen = "may backtrack without end" in str(error) and "\\N{" in pattern
            is_long = seconds > 0.0005 or NESTED.search(pattern) is not None
            assert is_unseen or ("gave up on" in str(error) and is_long)


@settings(max_examples=2000, deadline=None)
@given(PATTERNS, SUBJECTS)
def test_a_generated_pattern_matches_as_in_python(pattern: str, subject: str) -> None:
    agree(pattern, subject)


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="ab0.\\[](){}?*+|^$-,<>=!:#PdwsnZ \n", max_size=12), SUBJECTS)
def test_any_text_is_a_pattern_or_not_as_in_python(pattern: str, subject: str) -> None:
    agree(pattern, subject)


def test_the_kept_inputs_of_the_fuzzer_match_as_in_python() -> None:
    lines = CORPUS.read_text().split()
    assert lines
    for line in lines:
        pattern, _, subject = bytes.fromhex(line)[1:].partition(b"\n")
        agree(pattern.decode(errors="ignore").replace("\0", ""), subject.decode(errors="ignore"))


@pytest.mark.parametrize("preset", preset_names())
def test_the_patterns_of_a_preset_match_as_in_python(preset: str) -> None:
    for pattern, _ in preset_rows(preset):
        assert Pattern(pattern).native
        for name in NAMES:
            agree(pattern, name)


@pytest.mark.parametrize(
    ("pattern", "native"),
    [
        (r".*\.mlp\.(up|gate)_proj\.weight$", True),
        (r".*\.experts\.\d+\.w[13]\.weight$", True),
        (r"(?P<layer>\d+)\.(?P=layer)", False),
        ("caf\u00e9", False),
    ],
)
def test_the_common_subset_runs_natively(pattern: str, native: bool) -> None:
    assert Pattern(pattern).native is native


def test_a_pattern_keeps_its_text() -> None:
    pattern = Pattern(r"layers\.\d+")
    assert pattern.pattern == r"layers\.\d+"
    assert repr(pattern) == r"Pattern('layers\\.\\d+')"


EMAIL = r"([a-z0-9])(([\-.]|_+)?([a-z0-9]+))*@[a-z0-9]+[.](([a-z]{2,3})|([a-z]{2,3}[.][a-z]{2}))$"

# Each one keeps re.match busy for longer than anybody waits.
RUNAWAY = [
    (r"(a+)+$", "a" * 60 + "!"),
    (r"(a|a)*$", "a" * 60 + "!"),
    (r"(a|aa)+$", "a" * 60 + "!"),
    (r"(\w+\.?)+$", "a" * 60 + "!"),
    (r"(.*a){20}$", "a" * 60 + "!"),
    (r"(([a-z])+.)+[A-Z]([a-z])+$", "a" * 60),
    (EMAIL, "a" * 60 + "!"),
    (r"(?i)(\w+)*[xy]", "a" * 60),
    (r"(a*)*b", "a" * 60),
    (r"(a*)*b", "a" * 4000),
    (r"(?s)(.*)*x", "a" * 60),
    (r"(?P<all>a+)+$", "a" * 60 + "!"),
    (r"(?x) ( a+ )+ $  # no end", "a" * 60 + "!"),
    (r"(?i:(a+)+)\Z", "a" * 60 + "!"),
    (r"(?<!x)(a+)+$", "a" * 60 + "!"),
    (r"(?:(a)|b)*\1(a+)+$", "a" * 60 + "!"),
    (r"(a?){60}a{60}", "a" * 59),
    (r"(?i)\w*\w*\w*\w*\w*\w*[xy]", "a" * 400),
    (r"(\u00e9+)+$", "\u00e9" * 60 + "!"),
    ("(\u00e9|\u00e9)*$", "\u00e9" * 60 + "!"),
    (r"(a+)+$", "a" * 60 + "\u00e9"),
    (r"(\w+)*[xy]", "\u00e9" * 60),
    (r".*.*.*.*.*.*.*.*[xy]", "\u00e9" * 60),
]


@pytest.mark.parametrize(("pattern", "subject"), RUNAWAY)
def test_a_runaway_pattern_is_an_error_and_not_a_hang(pattern: str, subject: str) -> None:
    runaway = Pattern(pattern)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="gave up") as caught:
        runaway.match(subject)
    assert time.perf_counter() - start < 1.0
    assert pattern in str(caught.value)
    assert subject[:20] in str(caught.value)


def test_patterns_that_run_away_are_of_both_kinds() -> None:
    assert {Pattern(pattern).native for pattern, _ in RUNAWAY} == {True, False}


@pytest.mark.parametrize("pattern", [r"(?i)(\w+\.)*WEIGHT$", r"(?P<n>\w+\.)*weight\Z"])
def test_a_pattern_that_is_merely_large_is_no_runaway(pattern: str) -> None:
    name = "model." + "layers.0." * 200 + "weight"
    assert Pattern(pattern).match(name)
    assert not Pattern(pattern).match(name + "s")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers.(", r"pattern 'layers\.\(' does not compile: missing \), .* at position 7"),
        ("[a", "unterminated character set at position 0"),
        ("*a", "nothing to repeat at position 0"),
        (r"\q", r"bad escape \\q at position 0"),
        ("a{2,1}", "min repeat greater than max repeat at position 2"),
        ("a{99999999999999999999}", "the repetition number is too large"),
        ("(" * 3000, "does not compile"),
    ],
)
def test_an_invalid_pattern_is_an_error_with_its_position(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Pattern(pattern)
    assert caught.value.__cause__ is not None
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("a\0b", "pattern: .* holds a null character"), ("\ud800", "holds a lone surrogate")],
)
def test_a_pattern_that_c_cannot_hold_is_an_error(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pattern(pattern)


@pytest.mark.parametrize("wrong", [b"a", 3, None, re.compile("a")])
def test_a_pattern_or_subject_that_is_no_str_is_a_type_error(wrong: object) -> None:
    with pytest.raises(TypeError, match="pattern: expected a str, got"):
        Pattern(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="subject: expected a str, got"):
        Pattern("a").match(wrong)  # type: ignore[arg-type]


def test_a_warning_of_re_that_is_an_error_passes_through() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FutureWarning, match="nested set"):
            Pattern("[[a]")
