# SPDX-License-Identifier: Apache-2.0
"""A plan is made again from what a checkpoint says of it, for any number of ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.interop.configured_model import configured_model, model_class
from deepspeed_autotp.interop.transformers import config_texts
from deepspeed_autotp.planning.model_description import describe
from deepspeed_autotp.planning.plan_recipe import plan_of, recipe
from deepspeed_autotp.planning.planner import PlanRequest, make_plan
from tests.support.small_models import build

RULES = {
    "layer_specs": [
        {"patterns": [".*(gate|up)_proj.weight$"], "partition_type": "column"},
        {"patterns": [".*down_proj.weight$"], "partition_type": "row"},
    ],
    "use_default_specs": False,
}
CASES: dict[str, tuple[str, dict[str, Any], TPTrainingConfig, PlanRequest]] = {
    "llama": ("llama", {}, TPTrainingConfig(), PlanRequest()),
    "gpt2": ("gpt2", {}, TPTrainingConfig(), PlanRequest()),
    "bloom": ("bloom", {}, TPTrainingConfig(), PlanRequest()),
    "phi3": ("phi3", {}, TPTrainingConfig(), PlanRequest()),
    "gemma2": ("gemma2", {}, TPTrainingConfig(), PlanRequest()),
    "mixtral": ("mixtral", {"num_local_experts": 4}, TPTrainingConfig(), PlanRequest()),
    "one key head": ("llama", {"num_key_value_heads": 1}, TPTrainingConfig(), PlanRequest()),
    "grain": ("qwen2", {}, TPTrainingConfig(tp_grain_size=16), PlanRequest()),
    "preset": ("llama", {}, TPTrainingConfig(preset_model="llama"), PlanRequest()),
    "rules": ("llama", {}, TPTrainingConfig(partition_config=RULES), PlanRequest()),
    "gathered logits": ("llama", {}, TPTrainingConfig(), PlanRequest(gather_logits=True)),
    "replicated": (
        "llama",
        {},
        TPTrainingConfig(),
        PlanRequest(replicated=("model.layers.*.mlp",), individual=("model.layers.*.self_attn",)),
    ),
    "guesses": ("opt", {}, TPTrainingConfig(), PlanRequest(heuristics=False, large_layers=False)),
}


def saved(model: nn.Module, folder: Path) -> None:
    for name, text in config_texts(model).items():
        (folder / name).write_text(text)


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_same_for_any_number_of_ranks(name: str, tmp_path: Path) -> None:
    family, changes, settings, request = CASES[name]
    model = build(family, tied=name == "llama", **changes).bfloat16()
    model.get_input_embeddings().float()  # type: ignore[operator]
    saved(model, tmp_path)
    made_from = json.loads(json.dumps(recipe(describe(model), settings, request)))
    assert made_from["dtypes"]["most"] == "bfloat16"
    for ranks in (2, 3, 4):
        expected = make_plan(describe(model), settings, ranks=ranks, request=request)
        again = configured_model(tmp_path, made_from["model"])
        assert all(tensor.is_meta for tensor in again.parameters())
        assert plan_of(made_from, again, ranks=ranks).hash == expected.hash


def test_a_rule_that_a_user_wrote_into_the_tp_plan_is_kept(tmp_path: Path) -> None:
    model: Any = build("llama", tied=False)
    model._tp_plan = {**model._tp_plan, "model.layers.*.mlp.up_proj": "replicate"}
    saved(model, tmp_path)
    made_from = recipe(describe(model), TPTrainingConfig(), PlanRequest())
    assert made_from is not None
    again = configured_model(tmp_path, made_from["model"])
    before = make_plan(describe(again), TPTrainingConfig(), ranks=2)
    expected = make_plan(describe(model), TPTrainingConfig(), ranks=2)
    assert plan_of(made_from, again, ranks=2).hash == expected.hash != before.hash


def test_only_models_of_transformers_have_a_name(tmp_path: Path) -> None:
    model: Any = build("llama", tied=False)
    assert model_class(model) == "LlamaForCausalLM"
    model.__class__ = type("LlamaForCausalLM", (type(model),), {})
    assert model_class(model) is None
    assert model_class(nn.Linear(2, 2)) is None
    with pytest.raises(ValueError, match="config.json' is missing"):
        configured_model(tmp_path, None)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json' cannot be read"):
        configured_model(tmp_path, None)
    (tmp_path / "config.json").write_text('{"architectures": null}')
    with pytest.raises(ValueError, match="names no architecture"):
        configured_model(tmp_path, None)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 63}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no LlamaForCausalLM can be made of"):
        configured_model(tmp_path, None)


def test_rules_that_are_no_json_give_no_recipe() -> None:
    model = build("llama", tied=False)
    rules = TPTrainingConfig(partition_config={"lm_head_patterns": ["x"]})
    assert rules.partition_config is not None
    rules.partition_config["note"] = torch.ones(1)
    assert recipe(describe(model), rules, PlanRequest()) is None
