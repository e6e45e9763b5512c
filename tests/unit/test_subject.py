# SPDX-License-Identifier: Apache-2.0
"""What stands for a named model in a check, and that other processes make the same."""

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.interop.named_model import named_inputs, named_model
from deepspeed_autotp.self_check.subject import NoPlan, Subject, find_subject

MODELS = "tests.support.check_models"
RULES = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": ["0.weight"], "partition_type": "column"},
        {"patterns": ["1.weight"], "partition_type": "row"},
    ],
}
LINEARS = TPTrainingConfig(autotp_size=2, partition_config=RULES)


def found(
    text: str, settings: TPTrainingConfig, inputs: str | None = None, **options: Any
) -> tuple[Subject, nn.Module]:
    given = None if inputs is None else named_inputs(inputs)
    options = {"ranks": 2, "dtype": torch.float32, **options}
    return find_subject(text, named_model(text), settings, given=given, **options)


def assert_same(subject: Subject, model: nn.Module) -> None:
    made = pickle.loads(pickle.dumps(subject)).made()
    expected = dict(model.state_dict())
    assert made.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in made.state_dict().items())
    trains = {name: p.requires_grad for name, p in made.named_parameters()}
    assert trains == {name: p.requires_grad for name, p in model.named_parameters()}
    assert made.training


def test_the_twin_of_a_large_model_is_made_again_with_its_values() -> None:
    subject, model = found("llama", TPTrainingConfig(autotp_size=2), dtype=torch.bfloat16)
    assert subject.is_twin and subject.large_names == ()
    assert sum(p.numel() for p in model.parameters()) < 3_000_000
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_same(subject, model)


@pytest.mark.parametrize(("features", "partition"), [(192, "experts"), (512, "width")])
def test_a_twin_is_sharded_as_sizes_of_the_large_model_decide(
    features: int, partition: str
) -> None:
    text = f"qwen3_moe:num_hidden_layers=2,num_experts=8,moe_intermediate_size={features}"
    subject, _ = found(text, TPTrainingConfig(autotp_size=2, expert_partition="auto"))
    assert subject.is_twin and subject.settings.expert_partition == partition


def test_a_model_without_a_twin_is_trained_itself_on_given_inputs() -> None:
    text = f"{MODELS}:two_linears"
    subject, model = found(text, LINEARS, f"{MODELS}:vectors", dtype=torch.float64)
    assert not subject.is_twin
    assert subject.inputs.values["input"].dtype == torch.float64  # type: ignore[attr-defined]
    model(**subject.inputs.values)
    assert_same(subject, model)


@pytest.mark.parametrize(
    ("text", "settings", "inputs", "words"),
    [
        (f"{MODELS}:two_linears", LINEARS, None, "the inputs of Sequential are not known"),
        (f"{MODELS}:two_linears", LINEARS, f"{MODELS}:no", "--inputs: .*made nothing: Attribute"),
        (f"{MODELS}:two_linears", LINEARS, MODELS, "--inputs: got .*, expected module:function"),
        (f"{MODELS}:two_linears", LINEARS, "os:getcwd", "os:getcwd returned str, expected a dict"),
        ("jamba", TPTrainingConfig(autotp_size=2), None, "JambaForCausalLM has .* expected at mos"),
    ],
)
def test_what_cannot_be_trained_is_said(
    text: str, settings: TPTrainingConfig, inputs: str | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        found(text, settings, inputs)
    assert not isinstance(raised.value, NoPlan)


def test_a_model_that_cannot_be_sharded_so_is_told_apart() -> None:
    with pytest.raises(NoPlan, match="heads"):
        found("llama:num_attention_heads=4", TPTrainingConfig(autotp_size=8), ranks=8)
