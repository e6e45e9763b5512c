# SPDX-License-Identifier: Apache-2.0
"""Rules and models of the compiled core, as Python sees them."""

from typing import Any

import pytest

from deepspeed_autotp._core import Model, Plan, Rules
from tests.support.core_llama import ROOT_MODULE


def test_rules_match_parameter_or_module_in_order() -> None:
    rules = Rules()
    rules.add([r".*\.o_proj$"], {"partition_type": "row"}, label="first")
    rules.add([r"never", r".*proj"], {}, label="second")
    rules.add([r".*proj"], {}, label="third", model_types=["Llama"])
    assert len(rules) == 3
    name = "layers.0.o_proj.weight"
    assert rules.find(name) == (1,)
    assert rules.find(name, "layers.0.o_proj") == (0, 1)
    assert rules.find(name, "layers.0.o_proj", "llama") == (0, 1, 2)
    assert rules.find("norm.weight", model_type="llama") == ()


def test_a_style_matches_with_and_without_the_prefix() -> None:
    rules = Rules()
    rules.add_style("layers.*.q_proj", "colwise")
    assert rules.find("model.layers.0.q_proj.weight", "model.layers.0.q_proj", prefix="model")
    assert rules.find("layers.0.q_proj.weight", "layers.0.q_proj", prefix="model")
    assert not rules.find("x.layers.0.q_proj.weight", "x.layers.0.q_proj", prefix="model")


def test_a_rule_outside_the_common_subset_runs_in_python() -> None:
    rules = Rules()
    rules.add([r"(?P<a>\w)(?P=a)"], {}, label="twice")
    assert rules.find("ll") == (0,)
    assert rules.find("la") == ()


@pytest.mark.parametrize(
    ("patterns", "given", "error", "message"),
    [
        ("abc", {}, TypeError, "patterns: expected a list or tuple, got str"),
        ([], {}, ValueError, "patterns: the list is empty"),
        (["a", 3], {}, TypeError, r"patterns\[1\]: expected a str, got int"),
        (["a", "("], {}, ValueError, r"patterns\[1\]: pattern '\(' does not compile: .*position 0"),
        (["a"], {"model_types": "llama"}, TypeError, "model_types: expected a list or tuple"),
        (["a"], {"model_types": [None]}, TypeError, r"model_types\[0\]: expected a str, got None"),
        (["a"], {"source": "prest"}, ValueError, "source: unknown source 'prest'.*'preset'"),
    ],
)
def test_a_wrong_rule_says_which_and_adds_nothing(
    patterns: Any, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    rules = Rules()
    with pytest.raises(error, match=rf"^layer_specs\[1\]: {message}"):
        rules.add(patterns, {}, label="layer_specs[1]", **given)
    assert len(rules) == 0


def test_a_rule_needs_a_label() -> None:
    with pytest.raises(TypeError, match="missing required keyword-only argument: 'label'"):
        Rules().add(["a"], {})  # type: ignore[call-arg]


def test_a_pattern_that_does_not_compile_keeps_its_cause() -> None:
    with pytest.raises(ValueError, match="does not compile") as caught:
        Rules().add(["("], {}, label="here")
    assert type(caught.value.__cause__).__name__ in ("error", "PatternError")


def test_a_runaway_rule_is_an_error_of_find() -> None:
    rules = Rules()
    rules.add(["(a+)+$"], {}, label="here")
    with pytest.raises(ValueError, match="gave up"):
        rules.find("a" * 60 + "!")


@pytest.mark.parametrize(
    ("modules", "parameters", "error", "message"),
    [
        ("abc", [], TypeError, "modules: expected a list or tuple, got str"),
        ([3], [], TypeError, r"modules\[0\]: expected a tuple \(name, .*, got int"),
        ([("", "Net")], [], TypeError, r"modules\[0\]: expected a tuple .*, got 2 items"),
        ([("", "Net", "linaer", {})], [], ValueError, r"modules\[0\]: .*'linaer'.*'linear'"),
        ([("", 3, "other", {})], [], TypeError, r"modules\[0\]: class name: expected a str"),
        ([("", "N", "other", [])], [], TypeError, r"modules\[0\]: integers: expected a dict"),
        (
            [("", "N", "other", {"a": 1.5})],
            [],
            TypeError,
            r"modules\[0\]: integers: a: expected an int, got float",
        ),
        ([("a\0", "N", "other", {})], [], ValueError, r"modules\[0\]: name: .* null character"),
        ([ROOT_MODULE, ROOT_MODULE], [], ValueError, "two modules are called ''"),
        (
            [ROOT_MODULE],
            [("w", "w", 0, (3,), "float32", 4)],
            TypeError,
            r"parameters\[0\]: expected a tuple .*, got 6 items",
        ),
        (
            [ROOT_MODULE],
            [("w", "w", 1, (3,), "float32", 4, -1)],
            ValueError,
            r"parameters\[0\]: .*'w' is in module 1",
        ),
        (
            [ROOT_MODULE],
            [("w", "w", 0, (3, 4.0), "float32", 4, -1)],
            TypeError,
            r"parameters\[0\]: shape\[1\]: expected an int, got float",
        ),
        (
            [ROOT_MODULE],
            [("w", "w", 0, (1,) * 9, "float32", 4, -1)],
            ValueError,
            r"parameters\[0\]: shape: has 9 dimensions",
        ),
        (
            [ROOT_MODULE],
            [("w", "w", 0, (1 << 40, 1 << 40), "float32", 4, -1)],
            ValueError,
            r"parameters\[0\]: parameter 'w': with it the model has more than",
        ),
        (
            [ROOT_MODULE],
            [("w", "w", 0, (3,), "float32", 0, -1)],
            ValueError,
            r"parameters\[0\]: itemsize: 0 bytes",
        ),
        (
            [ROOT_MODULE],
            [("w", "w", 0, (3,), "float32", 4, 0)],
            ValueError,
            r"parameters\[0\]: .*'w' is tied to index 0",
        ),
    ],
)
def test_a_wrong_model_says_which_item(
    modules: Any, parameters: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        Model(modules, parameters)


def test_a_model_names_the_fact_that_is_wrong() -> None:
    with pytest.raises(TypeError, match="model_type: expected a str or None, got int"):
        Model([ROOT_MODULE], [], model_type=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="integers: heads: expected an int, got bool"):
        Model([ROOT_MODULE], [], integers={"heads": True})
    with pytest.raises(ValueError, match="output_head 5"):
        Model([ROOT_MODULE], [], output_head=5)


def test_an_empty_model_has_an_empty_plan() -> None:
    plan = Plan(Model([ROOT_MODULE], []), Rules(), ranks=2)
    assert plan.entries == () and plan.layers == () and plan.table() == ()
