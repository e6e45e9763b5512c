# SPDX-License-Identifier: Apache-2.0
"""Plans of transformers, rules, records and recipes of anybody's: an error for people, or a plan
whose shards are right."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepspeed_autotp import _core
from deepspeed_autotp._core import Plan, Rules
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.planning.model_description import describe
from deepspeed_autotp.planning.plan_recipe import plan_of, recipe
from deepspeed_autotp.planning.planner import PlanRequest, make_plan
from tests.support.core_llama import llama
from tests.support.fuzzing import fuzzed
from tests.support.hostile_values import NAMES, VALUES, mutated
from tests.support.one_error import check_error
from tests.support.plan_coverage import check_plan
from tests.support.small_models import build

pytestmark = pytest.mark.fuzz

PATTERNS = st.one_of(
    st.sampled_from(
        [
            *["model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.k_proj"],
            *["model.layers.*.self_attn.v_proj", "model.layers.*.self_attn.o_proj"],
            *["model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"],
            *["model.layers.*.mlp.down_proj", "model.embed_tokens", "lm_head", "model.norm"],
            *["layers.*.mlp", "*.mlp.*", "*", "", "model", "model.layers.1.mlp.up_proj.weight"],
        ]
    ),
    NAMES,
)
STYLES = st.one_of(st.sampled_from(_core.style_names()), NAMES)
TP_PLANS = st.dictionaries(PATTERNS, STYLES, max_size=8)


@fuzzed(80)
@given(TP_PLANS, st.integers(1, 5), st.booleans(), st.booleans())
def test_a_tp_plan_is_planned_or_refused(
    styles: Mapping[str, str], ranks: int, required: bool, families: bool
) -> None:
    rules = Rules()
    try:
        for pattern, style in styles.items():
            rules.add_style(pattern, style, required=required)
        check_plan(Plan(llama(), rules, ranks=ranks, families=families))
    except ValueError as error:
        check_error(error)


class Odd(nn.Module):
    """With anything as its ``_tp_plan``."""

    base_model_prefix = ""

    def __init__(self, plan: Any) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)
        vars(self)["_tp_plan"] = plan


ANY_PLANS = st.one_of(
    st.dictionaries(
        st.one_of(st.sampled_from(["up", "down", "*"]), VALUES.filter(lambda v: v.__hash__)),
        st.one_of(STYLES, VALUES),
        max_size=3,
    ),
    VALUES,
)


@fuzzed(50)
@given(ANY_PLANS)
def test_any_value_as_the_tp_plan_of_a_model_is_planned_or_refused(plan: Any) -> None:
    try:
        check_plan(make_plan(describe(Odd(plan)), TPTrainingConfig(), ranks=2))
    except ValueError as error:
        check_error(error)


RULES = {
    "layer_specs": [
        {"patterns": [".*(gate|up)_proj.weight$"], "partition_type": "column"},
        {"patterns": [".*down_proj.weight$"], "partition_type": "row", "shape": [-1, 2]},
    ],
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.device("meta"):
        return build("llama", tied=True)


@pytest.fixture(scope="module")
def recipes(model: nn.Module) -> dict[bool, Any]:
    """Without rules, and with some."""
    request = PlanRequest(replicated=("model.layers.0.mlp",), large_names=("lm_head",))
    given_settings = {False: TPTrainingConfig(), True: TPTrainingConfig(partition_config=RULES)}
    return {
        with_rules: json.loads(json.dumps(recipe(describe(model), settings, request)))
        for with_rules, settings in given_settings.items()
    }


@fuzzed(50)
@given(st.data(), st.booleans(), st.integers(1, 4))
def test_a_recipe_of_anybody_is_planned_or_refused(
    model: nn.Module,
    recipes: dict[bool, Any],
    data: st.DataObject,
    with_rules: bool,
    ranks: int,
) -> None:
    given_recipe = data.draw(mutated(recipes[with_rules]))
    try:
        plan = plan_of(given_recipe, model, ranks=ranks)
    except ValueError as error:
        check_error(error)
        return
    finally:
        vars(model).pop("_tp_plan", None)
    assert plan.ranks == ranks
    check_plan(plan)


SIZES = st.one_of(st.sampled_from([-1, 0, 1, 2, 4, 2**31, 2**63 - 1, 2**63, 10**400]), VALUES)
DTYPES = st.one_of(st.sampled_from(["bfloat16", "float16", "float32", "bf16"]), NAMES)


@fuzzed(80)
@given(SIZES, DTYPES, SIZES, SIZES, st.one_of(st.none(), DTYPES), st.booleans())
def test_recorded_arguments_are_merged_or_refused(
    tp_size: Any, dtype: str, autotp_size: Any, nested: Any, asked: str | None, bf16: bool
) -> None:
    records = _core.Records()
    try:
        records.add(1, tp_size, dtype)
        _core.merge(
            records.find(1), autotp_size=autotp_size, tp_size=nested, dtype=asked, bf16=bf16
        )
    except ValueError as error:
        check_error(error)
    except TypeError as error:
        assert "expected an int" in str(error)
    else:
        sizes = {max(size, 1) for size in (tp_size, autotp_size, nested) if size >= 0}
        assert len(sizes) <= 1
