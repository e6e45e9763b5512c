# SPDX-License-Identifier: Apache-2.0
"""What tp_model_init records, for how long, and for which model."""

import gc
import types

import pytest
import torch
from torch import nn

import deepspeed_autotp
from deepspeed_autotp.config.recorded_args import RECORDS, ModelRecords

pytestmark = pytest.mark.usefixtures("no_records")


def record(model: nn.Module, tp_size: int = 2, dtype: object = "bf16") -> nn.Module:
    return deepspeed_autotp.tp_model_init(model, tp_size, dtype)


def values(model: nn.Module) -> tuple[int, str, int, int] | None:
    found = RECORDS.of(model)
    return None if found is None else found.values


def test_the_model_comes_back_untouched() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    attributes, weight = dict(vars(model[0])), model[0].weight
    assert record(model) is model
    assert vars(model[0]) == attributes and model[0].weight is weight
    assert type(model[0]) is nn.Linear


def test_training_mode_is_switched_on() -> None:
    deepspeed_autotp.set_autotp_mode(training=False)
    assert not deepspeed_autotp.is_autotp_training_mode()
    record(nn.Linear(4, 4))
    assert deepspeed_autotp.is_autotp_training_mode()
    deepspeed_autotp.set_autotp_mode(training=False)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, "bf16", "bfloat16", "torch.bfloat16", "BFloat16"]
)
def test_every_spelling_of_a_data_type_is_the_same_record(dtype: object) -> None:
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    record(model)
    record(other, dtype=dtype)
    assert values(other) == values(model) == (2, "bfloat16", 0, 0)


def test_a_later_call_with_other_arguments_names_all_of_both() -> None:
    model = nn.Linear(4, 4)
    record(model, 2, "bf16")
    with pytest.raises(ValueError) as raised:
        record(nn.Linear(4, 4), 4, "fp16")
    text = str(raised.value)
    assert "tp_size: 4 now, but 2 before" in text
    assert "dtype: float16 now, but bfloat16 before" in text
    assert "deepspeed_autotp.reset()" in text


def test_the_same_model_cannot_be_recorded_with_another_size() -> None:
    model = nn.Linear(4, 4)
    record(model, 2)
    with pytest.raises(ValueError, match="tp_size: 4 now, but 2 before"):
        record(model, 4)
    assert values(model) == (2, "bfloat16", 0, 0)


def test_a_record_dies_with_its_model() -> None:
    model = nn.Linear(4, 4)
    record(model, 2)
    del model
    other = nn.Linear(4, 4)
    record(other, 4)
    assert values(other) == (4, "bfloat16", 0, 0)


def test_a_record_dies_with_a_model_that_refers_to_itself() -> None:
    class Wrapper:
        """As an engine, which holds its model and is held by hooks of it."""

        def __init__(self, model: nn.Module) -> None:
            self.model = model
            self.itself = self

    gc.disable()
    try:
        wrapper = Wrapper(record(nn.Linear(4, 4), 2))
        del wrapper
        other = record(nn.Linear(4, 4), 4)
    finally:
        gc.enable()
    assert values(other) == (4, "bfloat16", 0, 0)


def test_reset_forgets_every_record() -> None:
    model = nn.Linear(4, 4)
    record(model, 2)
    deepspeed_autotp.reset()
    assert values(model) is None
    record(model, 4)
    assert values(model) == (4, "bfloat16", 0, 0)


def test_a_record_holds_for_the_model_around_it_and_the_models_inside_it() -> None:
    inner = nn.Linear(4, 4)
    model = nn.Sequential(inner)
    record(model)
    assert values(nn.Sequential(model)) == (2, "bfloat16", 0, 0)
    assert values(inner) == (2, "bfloat16", 0, 0)
    assert values(nn.Linear(4, 4)) is None


def test_a_record_without_a_model_holds_for_any() -> None:
    deepspeed_autotp.record_tp_model_init_args(2, "fp32", None, None)
    assert values(nn.Linear(4, 4)) == (2, "float32", 0, 0)


def test_the_latest_record_that_is_alive_is_the_latest() -> None:
    records = ModelRecords()
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    group = object()
    for model in (first, second):
        records.add(model, tp_size=2, dtype="float32", tp_group=group, group_size=2)
    del second
    latest = records.latest()
    assert latest is not None and latest.tp_group is group
    assert latest.values == (2, "float32", id(group), 2)
    del first, model
    assert records.latest() is None and not records.any_alive()


@pytest.mark.parametrize("size", [True, "2", 2.0, None])
def test_a_size_that_is_no_int_is_refused(size: object) -> None:
    with pytest.raises(TypeError, match="tp_model_init: tp_size: got .* expected an int"):
        deepspeed_autotp.tp_model_init(nn.Linear(4, 4), size, "bf16")  # type: ignore[arg-type]
    assert not RECORDS.any_alive()


@pytest.mark.parametrize("size", [0, -2])
def test_a_size_below_one_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"tp_size is {size}, but it must be at least 1"):
        record(nn.Linear(4, 4), size)


def test_an_unknown_data_type_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="tp_model_init: dtype.*bf61.*bf16"):
        record(nn.Linear(4, 4), 2, "bf61")


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="model: got 'llama' \\(str\\), expected a torch.nn.Module"):
        deepspeed_autotp.tp_model_init("llama", 2, "bf16")  # type: ignore[arg-type]


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="tp_grup"):
        deepspeed_autotp.tp_model_init(nn.Linear(4, 4), 2, "bf16", tp_grup=None)


def test_a_configuration_is_checked_at_once_and_stays_as_it_is() -> None:
    model = nn.Linear(4, 4)
    config = {"tensor_parallel": {"autotp_size": 4}, "fp16": {"enabled": True}}
    with pytest.raises(ValueError) as raised:
        deepspeed_autotp.tp_model_init(model, 2, "bf16", config=config)
    assert "2 conflicts" in str(raised.value)
    assert config == {"tensor_parallel": {"autotp_size": 4}, "fp16": {"enabled": True}}
    assert values(model) is None, "what is refused is not recorded"
    fitting = {"tensor_parallel": {"autotp_size": 2}, "bf16": {"enabled": "auto"}}
    deepspeed_autotp.tp_model_init(model, 2, "bf16", config=fitting)
    assert values(model) == (2, "bfloat16", 0, 0)


def test_sections_may_be_any_mapping() -> None:
    section = types.MappingProxyType({"autotp_size": 2})
    deepspeed_autotp.tp_model_init(
        nn.Linear(4, 4), 2, "bf16", config={"train_batch_size": 2, "tensor_parallel": section}
    )
    config = {"tensor_parallel": section}
    deepspeed_autotp.record_tp_model_init_args(2, "bf16", None, None)
    deepspeed_autotp.merge_tp_model_init_into_config(config, None, None, None)
    assert dict(config["tensor_parallel"])["autotp_size"] == 2
