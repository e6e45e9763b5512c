# SPDX-License-Identifier: Apache-2.0
"""Cases from seeds and from text, and plainer ones from others."""

import ast
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from tests.support.prove.case import Case
from tests.support.prove.contradictions import settle


def draw(seed: int, **fixed: Any) -> Case:
    """The case of a seed; ``fixed`` replace what is drawn."""
    source = random.Random(seed)
    drawn: dict[str, Any] = {"seed": seed}
    for each in fields(Case):
        values, plain = each.metadata["values"], each.metadata["plain"]
        number, other = source.random(), source.randrange(max(1, len(values) - 1))
        if each.name != "seed":
            drawn[each.name] = values[0] if number < plain else values[1:][other]
    return settle(Case(**{**drawn, **fixed}))


def parse(text: str) -> Case:
    """The case that ``str`` writes."""
    return settle(Case(**parse_fields(text)))


def parse_fields(text: str) -> dict[str, Any]:
    """Names and values of fields, as a case is written."""
    tree = ast.parse(f"dict({', '.join(_assignments(text))})", mode="eval")
    assert isinstance(tree.body, ast.Call)
    return {str(each.arg): ast.literal_eval(each.value) for each in tree.body.keywords}


def draw_with(seeds: Iterable[int], fixed: Mapping[str, Any]) -> Iterator[Case]:
    """The cases of these seeds with some fields fixed, without those that contradict them."""
    for seed in seeds:
        case = draw(seed, **fixed)
        if all(getattr(case, name) == value for name, value in fixed.items()):
            yield case


def _assignments(text: str) -> list[str]:
    """``a=1 b='c d'`` at the spaces that are not within quotes."""
    found, quoted = [""], False
    for letter in text.strip():
        quoted ^= letter == "'"
        if letter == " " and not quoted:
            found.append("")
        else:
            found[-1] += letter
    return [each for each in found if each]


def is_plainer(case: Case, name: str, value: Any) -> bool:
    values = Case.__dataclass_fields__[name].metadata["values"]
    return bool(values.index(value) < values.index(getattr(case, name)))


def plainer(case: Case) -> Iterator[tuple[str, Any]]:
    """Fields and values for them that are plainer: first the plain value of each field, then those
    between."""
    for is_between in (False, True):
        for each in fields(case):
            values, own = each.metadata["values"], getattr(case, each.name)
            if each.name != "seed" and own in values[1:]:
                nearer = values[1 : values.index(own)] if is_between else values[:1]
                yield from ((each.name, value) for value in nearer)
