# SPDX-License-Identifier: Apache-2.0
"""What the core is told about a torch model."""

from typing import Any

import pytest
import torch
from torch import nn

from deepspeed_autotp import _core
from deepspeed_autotp.interop.transformers import model_facts, other_modalities
from deepspeed_autotp.planning.model_description import Description, describe, dtype_name
from tests.support.small_models import build
from tests.support.worker_pool import Pool


def plan_of(description: Description, *patterns: str) -> _core.Plan:
    """All that the core knows of a model shows in a plan that shards what ``patterns`` name."""
    rules = _core.Rules()
    if patterns:
        rules.add(list(patterns), {"partition_type": "column"}, label="rule")
    return _core.Plan(description.model, rules, ranks=2, defaults=False)


class Twice(nn.Module):
    """One module under two names, a tensor under two more, and one without a module of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.again = self.first
        self.other = nn.Linear(4, 6, bias=False)
        self.other.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))


def test_a_tensor_is_tied_to_its_first_name() -> None:
    model = Twice()
    found = describe(model)
    entries = plan_of(found).entries
    assert [entry.name for entry in entries] == ["scale", "first.weight", "first.bias"] + [
        "other.weight"
    ]
    assert [entry.tied_to for entry in entries] == [-1, -1, -1, 1]
    assert [id(p) for p in found.parameters] == [
        id(model.scale),
        id(model.first.weight),
        id(model.first.bias),
        id(model.first.weight),
    ]
    assert found.modules["first"] is model.first


def describe_tied() -> None:
    model = build("qwen2", tied=True)
    found = describe(model)
    names = [entry.name for entry in plan_of(found).entries]
    named = dict(model.named_parameters(remove_duplicate=False))
    assert sorted(names) == sorted(named)
    assert all(named[n] is p for n, p in zip(names, found.parameters, strict=True))
    assert found.modules == dict(model.named_modules())


def test_every_parameter_of_a_model_is_there_once_per_name(pool: Pool) -> None:
    pool.run(describe_tied, ranks=1)


def describe_meta() -> tuple[str, str]:
    real = plan_of(describe(build("llama", tied=False)), r".*q_proj")
    with torch.device("meta"):
        model = build("llama", tied=False)
    return real.hash, plan_of(describe(model), r".*q_proj").hash


def test_a_model_on_the_meta_device_is_described_alike(pool: Pool) -> None:
    [(real, meta)] = pool.run(describe_meta, ranks=1)
    assert real == meta


def test_a_parameter_that_zero_has_partitioned_has_its_full_shape() -> None:
    layer = nn.Linear(4, 6)
    written: Any = layer.weight
    written.ds_shape = torch.Size((6, 4))
    layer.weight.data = torch.empty(0)
    assert plan_of(describe(layer)).entries[0].shape == (6, 4)


class OwnLinear(nn.Linear):
    pass


class OwnEmbedding(nn.Embedding):
    pass


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(4, 6), "column"),
        (OwnLinear(4, 6), "column"),
        (nn.Embedding(6, 4), "hidden"),
        (OwnEmbedding(6, 4), "hidden"),
    ],
)
def test_a_subclass_is_of_its_base_class_kind(module: nn.Module, kind: str) -> None:
    plan = plan_of(describe(nn.Sequential(module)), r"0\.weight")
    assert [(layer.module, layer.kind) for layer in plan.layers] == [("0", kind)]


def describe_integers() -> dict[tuple[str, str], tuple[int, ...]]:
    """The integers that become local when a llama with two key/value heads is on four ranks."""
    found = describe(build("llama", tied=False, num_key_value_heads=2))
    rules = _core.Rules()
    rules.add([r".*\.[qkv]_proj\.weight"], {"partition_type": "column"}, label="columns")
    rules.add([r".*\.o_proj\.weight"], {"partition_type": "row"}, label="rows")
    plan = _core.Plan(found.model, rules, ranks=4, defaults=False)
    return {(integer.module, integer.key): integer.values for integer in plan.integers}


def test_integers_are_a_modules_own_and_those_of_its_configuration(pool: Pool) -> None:
    [local] = pool.run(describe_integers, ranks=1)
    attention = "model.layers.1.self_attn"
    assert local[attention, "num_key_value_groups"] == (2, 2, 2, 2)
    assert local[attention, "config.num_key_value_heads"] == (1, 1, 1, 1)
    assert local[attention, "config.num_attention_heads"] == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float8_e4m3fn, "float8_e4m3fn")]
)
def test_a_data_type_has_its_bare_name(dtype: torch.dtype, name: str) -> None:
    assert dtype_name(dtype) == name


def test_a_model_with_two_text_models_is_described_by_its_own_configuration() -> None:
    class Config:
        model_type = "two"
        hidden_size = 8

        def get_text_config(self) -> Any:
            raise ValueError("several")

    model = nn.Sequential(nn.Linear(2, 2))
    model.config = Config()
    facts = model_facts(model)
    assert facts.model_type == "two"
    assert other_modalities(model) == []
