# SPDX-License-Identifier: Apache-2.0
"""Patterns that are made to take long: a bound for each match, and one for all of a plan."""

import time

import pytest

from deepspeed_autotp._core import Model, Pattern, Plan, Rules
from tests.support.core_llama import ROOT_MODULE
from tests.support.one_error import check_error

# Nominally 10 ms of a processor; other processes share its caches.
SECONDS = 0.05

LENGTHS = (30, 60, 200, 1000, 4000, 16_000)
RUNAWAY = [
    r"(a+)+$",
    r"(a|aa)+$",
    r"(.*a){20}$",
    r"(?:a?){60}a{60}!$",
    r"((a*)*)*b",
    r"(((((((((a*)*)*)*)*)*)*)*)*)*b",
    r".*.*.*.*.*.*.*.*[xy]",
    r"(\w+\s?)+$",
    r"(?=(a+)+$)b",
    r"(?!(a+)+$)b",
    r"(?:(?=a*)a*)*b",
    r"(a*)\1(a*)\2(a*)\3b",
    r"(?:(a*)\1)*b",
    r"(?P<n>a+)+(?P=n)$",
    r"(?<=a)(a+)+$|(a+)+$",
    r"(?i)(a+)+$",
    r"(?a)(\w+)+$",
    r"(?a:(\w+)+)$",
    r"(?u)(\w+)+$",
    r"(?ai)(?-i:(a+)+)$",
    r"(?:a{,9}){,99}$",
    r"(a{,}){,}$",
    r"(a{1,60}){1,60}$",
    r"((a{0,30}){0,30}){0,30}$",
    r"(x?a?){200}b",
    r"(a|a|a|a|a|a|a|a)*$",
    r"(?>(a+)+$)",
    r"(?:a+)++(a+)+$",
    r"(?x) ( a + ) + $ # {,9} [",
    r"([^b]+)+b",
    r"(\u0061+)+$",
    r"(?(1)b|(a+)+$)",
]


def match_time(pattern: Pattern, name: str) -> float:
    start = time.thread_time()
    try:
        assert pattern.match(name) is False
    except ValueError as error:
        assert "gave up on" in check_error(error)
    return time.thread_time() - start


@pytest.mark.parametrize("pattern", RUNAWAY)
def test_a_match_ends_in_milliseconds_on_names_of_any_length(pattern: str) -> None:
    compiled = Pattern(pattern)
    for length in LENGTHS:
        for name in ("a" * length + "!", "\u00e9" * (length // 2) + "!"):
            assert min(match_time(compiled, name) for _ in range(3)) < SECONDS, length


@pytest.mark.parametrize(
    "pattern",
    [
        r"(\N{LATIN SMALL LETTER A}+)+$",
        r"(a{0,70000})+$",
        r"(((a{0,1000}){0,1000}){0,1000}){0,1000}$",
        f"(?P<{'n' * 33}>a+)+$",
    ],
)
def test_what_pcre2_cannot_see_the_end_of_is_refused(pattern: str) -> None:
    try:
        compiled = Pattern(pattern)
    except ValueError as error:
        assert "may backtrack without end" in check_error(error)
    else:
        assert min(match_time(compiled, "a" * 60 + "!") for _ in range(3)) < SECONDS


@pytest.mark.parametrize("pattern", [r"\N{LATIN SMALL LETTER A}+\N{DIGIT ONE}", r"a{0,70000}1"])
def test_with_one_repeat_it_is_no_danger(pattern: str) -> None:
    assert Pattern(pattern).match("aaa1")
    assert not Pattern(pattern).match("aaa")


def test_patterns_and_names_that_are_none_are_refused_by_their_size() -> None:
    with pytest.raises(ValueError, match="has 70000 bytes, expected at most 65536") as caught:
        Pattern("a" * 70_000)
    assert len(check_error(caught.value)) < 500
    with pytest.raises(ValueError, match="of 10000000 bytes, expected a name of at most 32768"):
        Pattern("a+").match("a" * 10_000_000)


@pytest.mark.parametrize("pattern", ["(?:" * 40 + "a*" + ")*" * 40, "(" * 90 + "a" + ")" * 90])
def test_deep_nesting_ends_as_soon(pattern: str) -> None:
    compiled = Pattern(pattern + "$")
    assert compiled.match("a")
    assert min(match_time(compiled, "a" * 60 + "!") for _ in range(3)) < SECONDS


def test_a_pattern_of_thousands_of_groups_is_compiled_in_time() -> None:
    start = time.thread_time()
    for pattern in ("|".join(f"(a{i}b*)" for i in range(1000)), "(a?)" * 2000, "a{1,60}" * 500):
        try:
            Pattern(pattern)
        except ValueError as error:
            check_error(error)
    assert time.thread_time() - start < 10


def model(count: int, name: str) -> Model:
    """A model of ``count`` linear layers."""
    modules = [ROOT_MODULE, *((f"{name}.{i}", "Linear", "linear", {}) for i in range(count))]
    return Model(
        modules,
        [
            (f"{module}.weight", "weight", index, (8, 8), "float32", 4, -1)
            for index, (module, *_) in enumerate(modules[1:], 1)
        ],
    )


@pytest.mark.parametrize("pattern", [".*.*.*!", "(?i).*.*.*!", "(?:a|aa|aaa){1,14}!", "(.*a){4}!"])
def test_a_plan_of_many_long_matches_ends_in_seconds_and_names_a_pattern(pattern: str) -> None:
    rules = Rules()
    for _ in range(200):
        rules.add([pattern.replace("!", "[!#]")], {"partition_type": "skip"}, label="rule")
    large = model(1000, "a" * 60)
    start = time.thread_time()
    with pytest.raises(ValueError, match="gave up on") as caught:
        Plan(large, rules, ranks=2)
    assert pattern[:6] in check_error(caught.value)
    assert time.thread_time() - start < 60


def test_a_plan_of_many_usual_patterns_is_made() -> None:
    rules = Rules()
    for index in range(200):
        rules.add([rf".*\.layers\..*\.{index}\.w.*t$"], {"partition_type": "skip"}, label="rule")
    rules.add([".*.*weight$"], {"partition_type": "column"}, label="all")
    assert Plan(model(1000, "model.layers"), rules, ranks=2).entries[0].is_sharded
