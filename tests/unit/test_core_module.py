# SPDX-License-Identifier: Apache-2.0
"""The types of the compiled core are closed, and nothing they hold is lost."""

import re
import sys
from collections.abc import Callable

import pytest

from deepspeed_autotp import _core
from deepspeed_autotp._core import Model, Pattern, Plan, Records, Rules
from tests.support.core_llama import ROOT_MODULE, llama, preset
from tests.support.held_memory import held


@pytest.mark.parametrize("name", ["Entry", "Layer", "LocalInteger", "Row"])
def test_parts_of_a_plan_cannot_be_made_by_hand(name: str) -> None:
    with pytest.raises(TypeError, match="cannot create"):
        vars(_core)[name]()


@pytest.mark.parametrize("kind", [Pattern, Records, Rules, Model, Plan])
def test_types_are_final_and_read_only(kind: type) -> None:
    with pytest.raises(TypeError, match="not an acceptable base type"):
        type("Derived", (kind,), {})
    with pytest.raises(TypeError, match="immutable type"):
        kind.extra = 1  # type: ignore[attr-defined]


def test_values_of_a_plan_cannot_be_changed() -> None:
    plan = Plan(llama(), preset(), ranks=2)
    for value, name in ((plan, "ranks"), (plan.entries[0], "kind"), (plan.table()[0], "count")):
        with pytest.raises(AttributeError):
            setattr(value, name, 3)
    with pytest.raises(AttributeError):
        Pattern("a").pattern = "b"  # type: ignore[misc]


def refused(call: Callable[[], object]) -> None:
    try:
        call()
    except (TypeError, ValueError):
        return
    raise AssertionError("the call was to be refused")


def use_plan() -> None:
    rules = preset()
    rules.add(["(?P<a>x)(?P=a)"], {"shape": [[1, 2], -1]}, label="a", model_types=["llama"])
    plan = Plan(llama(), rules, ranks=2, head_patterns=["lm_head"])
    for entry in plan.entries:
        repr(entry), entry.name, entry.kind, entry.source, entry.rule, entry.shape, entry.view
        entry.tied_to, entry.dim, entry.local_shape(1), entry.runs(1), entry.shared(1)
    for layer in plan.layers:
        repr(layer), layer.module, layer.kind, layer.weight, layer.bias, layer.gather_output
    for local in plan.integers:
        repr(local), local.module, local.key, local.full, local.values
    for row in plan.table():
        repr(row), row.pattern, row.entry, row.local_bytes, row.full_bytes
    repr(plan), plan.hash, plan.messages, plan.ranks


def use_records() -> None:
    records = Records()
    records.add(1, 2, "bf16")
    records.find(1), records.latest(), len(records)
    refused(lambda: records.add(2, 4, "bf16"))
    records.remove(1)
    _core.merge((2, "bfloat16", 0, 0))
    refused(lambda: _core.merge((2, "bfloat16", 0, 0), autotp_size=4))
    _core.settle_tp_size([("a", 2), ("b", 2)])
    refused(lambda: _core.settle_tp_size([("a", 2), ("b", 4)]))
    refused(lambda: _core.settle_tp_size([("a", "2")]))  # type: ignore[list-item]


def use_functions() -> None:
    (
        _core.split(97, 1, 4),
        _core.split_grain(97, 32, 2),
        _core.core_info(),
        _core.precision(True, True),
    )
    _core.nearest("lama", ["llama", "lamb"]), _core.dtype_name("bf16", "x"), _core.preset_names()
    for name in _core.preset_names():
        _core.preset_rows(name)
    (
        _core.style_names(),
        _core.style_spec("colwise", "x"),
        _core.check_spec({"shape": [[1, 2], -1]}, "x"),
    )
    refused(lambda: _core.check_spec({"shape": [[1, 2], [3]]}, "x"))
    refused(lambda: _core.dtype_name("nothing", "x"))
    refused(lambda: _core.nearest("a", ["b", 3]))  # type: ignore[list-item]


def use_patterns() -> None:
    for text in (r"layers\.\d+", r"(?P<a>x)(?P=a)", "caf\u00e9"):
        pattern = Pattern(text)
        pattern.match("layers.1"), pattern.match("caf\u00e9"), pattern.pattern, repr(pattern)
    refused(lambda: Pattern("("))
    refused(lambda: Pattern(3))  # type: ignore[arg-type]


def use_what_is_refused() -> None:
    rules = Rules()
    refused(lambda: rules.add(["a", "("], {}, label="x"))
    refused(lambda: rules.add(["a"], {}, label="x", model_types=["llama", 3]))  # type: ignore[list-item]
    refused(lambda: rules.add(["a"], {"shap": 3}, label="x"))
    refused(lambda: rules.add_preset("lama"))
    refused(lambda: rules.add_style("a", "colwis"))
    refused(lambda: Model([ROOT_MODULE], [("w", "w", 3, (3,), "float32", 4, -1)]))
    refused(lambda: Model([ROOT_MODULE, ROOT_MODULE], []))
    refused(lambda: Plan(llama(), rules, ranks=0))
    rules.add([r".*down_proj"], {"shape": [3, -1]}, label="x")
    refused(lambda: Plan(llama(), rules, ranks=2))


@pytest.mark.parametrize(
    "use", [use_plan, use_records, use_functions, use_patterns, use_what_is_refused]
)
def test_nothing_is_held_after_use(use: Callable[[], None]) -> None:
    rounds = 200
    counted = [None, True, False, re.error, ValueError, TypeError]
    counted += [vars(_core)[name] for name in _core.__all__]
    for _ in range(20):
        use()
    grown = [growth(use, rounds, counted) for _ in range(3)]
    # One byte, block or reference too many per round would be `rounds` of them in every
    # measurement; caches and free lists of Python grow in some and then stay.
    for name, allowed, *values in zip(
        ("bytes", "blocks", *map(repr, counted)),
        (rounds * 8, *[rounds // 2] * (1 + len(counted))),
        *grown,
        strict=True,
    ):
        assert min(values) < allowed, (name, values)


def growth(use: Callable[[], None], rounds: int, counted: list[object]) -> list[int]:
    """By how much ``rounds`` of ``use`` grow bytes, blocks and references to ``counted``."""
    before = [*held(), *map(sys.getrefcount, counted)]
    for _ in range(rounds):
        use()
    after = [*held(), *map(sys.getrefcount, counted)]
    return [end - start for start, end in zip(before, after, strict=True)]
