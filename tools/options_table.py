# SPDX-License-Identifier: Apache-2.0
"""docs/options.md from the table that the tests run."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.options import LOOP, WORKS, Option
from tests.support.options_table import SECTIONS

_BEGINNING = """\
# Options beside tensor parallelism

What DeepSpeed 0.19.8, optimizers and loops offer, and what happens with it at a TP size above 1.
`make docs-pages` writes this page from the table that `make loops` runs, and a test fails where
the installed DeepSpeed reads a key that is not here.

- **works**: three steps of a small Llama have the losses, gradient norms and weights of the same
  run without tensor parallelism, at TP 2, and with two data-parallel replicas where it says DP 2.
  The ZeRO stages are those that were compared; "loop" is a loop without DeepSpeed.
- **refused**: an error that names the option, the same on every rank, before the first step.
- **not ours**: it does not meet tensor parallelism, or is of something that is refused.
- **not tried**: neither refused nor compared, for the reason that is given.
"""
_HEAD = "| option | what happens | tested | note |\n|---|---|---|---|\n"


def page() -> str:
    """The page, from the table."""
    parts = [_BEGINNING]
    for heading, options in SECTIONS.items():
        rows = "".join(_row(option) for option in options)
        parts.append(f"\n## {heading}\n\n{_HEAD}{rows}")
    return "".join(parts)


def _row(option: Option) -> str:
    other = f"[{option.tested}](../tests/{option.tested})" if option.tested else "no"
    tested = _tested(option) if option.runs else other
    note = option.note[:1].upper() + option.note[1:]
    return f"| {option.name} | {option.outcome} | {tested} | {note} |\n"


def _tested(option: Option) -> str:
    size = "TP 2" if option.replicas == 1 else f"TP 2 x DP {option.replicas}"
    stages = [stage for stage in option.stages if stage is not None]
    where = ["loop"] if LOOP in option.stages else []
    if stages:
        where.append(f"ZeRO {_listed(stages)}")
    if option.outcome == WORKS and option.bound > 1e-2:
        where.append("to 16-bit rounding")
    return ", ".join([size, *where])


def _listed(stages: Iterable[int]) -> str:
    return ", ".join(str(stage) for stage in stages)
