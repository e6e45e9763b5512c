# SPDX-License-Identifier: Apache-2.0
"""The section tensor_parallel: fields, spellings and refusals."""

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from deepspeed.runtime.tensor_parallel.config import TPConfig as DeepSpeedTPConfig
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig as DeepSpeedTraining
from pydantic import BaseModel

from deepspeed_autotp.config.autotp_config import AutoTPPresets
from deepspeed_autotp.config.training_config import (
    TPConfig,
    TPTrainingConfig,
    deepspeed_section,
    get_tensor_parallel_config,
)
from tests.support.value_error import message_of

RULES = {"layer_specs": [{"patterns": [".*q_proj"], "partition_type": "row"}]}


def test_the_defaults_are_deepspeeds() -> None:
    ours, theirs = dict(TPTrainingConfig()), dict(DeepSpeedTraining())
    assert dict(ours.pop("tensor_parallel")) == dict(theirs.pop("tensor_parallel"))
    assert ours.pop("self_check") == "auto"
    assert ours.pop("sequence_parallel") is False and ours.pop("monitor") is False
    assert ours.pop("expert_partition") == "width"
    assert ours == theirs
    assert issubclass(TPTrainingConfig, BaseModel)


def test_both_classes_have_all_fields_and_aliases_of_deepspeed() -> None:
    for ours, theirs in ((TPTrainingConfig, DeepSpeedTraining), (TPConfig, DeepSpeedTPConfig)):
        assert set(theirs.model_fields) <= set(ours.model_fields)
    assert TPTrainingConfig(tp={"tp_size": 3}).tensor_parallel.tp_size == 3
    assert TPTrainingConfig(kernel_inject=False).replace_with_kernel_inject is False


def test_the_documented_example_works() -> None:
    config = get_tensor_parallel_config(
        {
            "tensor_parallel": {"autotp_size": 4, "tp_grain_size": 64, "preset_model": "llama"},
            "train_batch_size": 8,
            "bf16": {"enabled": True},
        }
    )
    assert config.autotp_size == 4
    assert config.tensor_parallel.tp_grain_size == 64
    partition = config.get_partition_config_object()
    assert partition is not None
    assert partition.tp_size == 4
    assert partition.layer_specs == AutoTPPresets.llama().layer_specs


@pytest.mark.parametrize("config", [{}, {"tensor_parallel": None}, {"tensor_parallel": {}}])
def test_a_configuration_without_the_section_gives_the_defaults(config: dict[str, Any]) -> None:
    assert get_tensor_parallel_config(config) == TPTrainingConfig()


@pytest.mark.parametrize(
    "given", [torch.bfloat16, "bf16", "bfloat16", "torch.bfloat16", "BF16", " BFloat16 "]
)
def test_a_dtype_is_stored_as_torchs(given: Any) -> None:
    assert TPTrainingConfig(dtype=given).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ("half", torch.float16),
        ("fp16", torch.float16),
        ("float", torch.float32),
        ("fp32", torch.float32),
        ("torch.float32", torch.float32),
        ("double", torch.float64),
        (torch.float64, torch.float64),
    ],
)
def test_every_usual_dtype_is_known(given: Any, dtype: torch.dtype) -> None:
    assert TPTrainingConfig(dtype=given).dtype is dtype


def test_an_unknown_dtype_names_the_nearest() -> None:
    message = message_of(TPTrainingConfig, dtype="bfloat61")
    assert message.startswith("tensor_parallel.dtype: 'bfloat61' is not a dtype; did you mean")
    assert "'bfloat16'" in message


def test_a_dtype_that_is_none_for_training_is_refused() -> None:
    message = message_of(TPTrainingConfig, dtype=torch.int8)
    assert message.startswith("tensor_parallel.dtype: 'torch.int8' is not a dtype")
    assert message_of(TPTrainingConfig, dtype=16) == (
        "tensor_parallel.dtype: got 16 (int), expected a torch dtype or its name, such as 'bf16'"
    )


@pytest.mark.parametrize("key", ["tp", "tensor_parallel"])
@pytest.mark.parametrize("wrap", [dict, lambda fields: TPConfig(**fields)])
def test_both_spellings_of_the_nested_section_work(key: str, wrap: Any) -> None:
    group = object()
    config = TPTrainingConfig(**{key: wrap({"tp_size": 2, "tp_group": group})})
    assert config.tensor_parallel.tp_size == 2
    assert config.tensor_parallel.tp_group is group


def test_two_equal_spellings_are_fine_and_different_ones_are_not() -> None:
    both = TPTrainingConfig(tp={"tp_size": 2}, tensor_parallel={"tp_size": 2})
    assert both.tensor_parallel.tp_size == 2
    assert message_of(TPTrainingConfig, tp={"tp_size": 2}, tensor_parallel={"tp_size": 4}) == (
        "tensor_parallel.tensor_parallel: got {'tp_size': 4} (dict), but tp, another spelling of "
        "it, is {'tp_size': 2} (dict); write one of them"
    )


def test_a_problem_in_the_nested_section_has_the_path_the_user_wrote() -> None:
    for key in ("tp", "tensor_parallel"):
        assert message_of(TPTrainingConfig, **{key: {"tp_sise": 2}}).startswith(
            f"tensor_parallel.{key}.tp_sise: unknown key; did you mean 'tp_size'"
        )
        assert message_of(TPTrainingConfig, **{key: {"tp_size": 0}}) == (
            f"tensor_parallel.{key}.tp_size: got 0 (int), expected an integer of at least 1"
        )
        assert message_of(TPTrainingConfig, **{key: 4}) == (
            f"tensor_parallel.{key}: got 4 (int), expected a dictionary"
        )
        assert message_of(TPTrainingConfig, **{key: {3: 4}}) == (
            f"tensor_parallel.{key}: got a dictionary with the key 3 (int), "
            "expected strings as keys"
        )


@pytest.mark.parametrize("nested", [{}, {"tp_size": 2}, {"tp_size": 2, "tp_grain_size": 64}])
@pytest.mark.parametrize("wrap", [dict, lambda fields: TPConfig(**fields)])
def test_the_grain_size_may_stand_outside_the_nested_section(nested: Any, wrap: Any) -> None:
    given = wrap(nested)
    before = copy.deepcopy(given)
    config = TPTrainingConfig(tp_grain_size=64, tp=given)
    assert config.tensor_parallel.tp_grain_size == 64
    assert config.tensor_parallel.tp_size == nested.get("tp_size", 1)
    assert given == before


@pytest.mark.parametrize("wrap", [dict, lambda fields: TPConfig(**fields)])
def test_two_different_grain_sizes_are_refused(wrap: Any) -> None:
    nested = wrap({"tp_grain_size": 32})
    assert message_of(TPTrainingConfig, tp_grain_size=64, tp=nested) == (
        "tensor_parallel.tp_grain_size: got 64, but tp_grain_size in the nested section is "
        "32; write one of them"
    )


def test_a_grain_size_below_one_is_refused_in_both_places() -> None:
    wrong = "tp_grain_size: got 0 (int), expected an integer of at least 1"
    assert message_of(TPTrainingConfig, tp_grain_size=0) == f"tensor_parallel.{wrong}"
    assert message_of(TPTrainingConfig, tp={"tp_grain_size": 0}) == f"tensor_parallel.tp.{wrong}"


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("autotp_sise", "'autotp_size'"),
        ("preset", "'preset_model'"),
        ("tp_grainsize", "'tp_grain_size'"),
        ("kernel_injekt", "'kernel_inject'"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, near: str) -> None:
    message = message_of(TPTrainingConfig, **{key: 1})
    assert message.startswith(f"tensor_parallel.{key}: unknown key; did you mean ")
    assert near in message


def test_a_key_that_resembles_nothing_gets_the_whole_list() -> None:
    message = message_of(TPTrainingConfig, zzzzzzzzzzzzzzzz=1)
    assert message.startswith("tensor_parallel.zzzzzzzzzzzzzzzz: unknown key; known: dtype, ")
    for name in ("autotp_size", "tp", "tp_grain_size", "self_check"):
        assert name in message.split("known: ")[1].split(", ")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("autotp_size", -1, "an integer of at least 0"),
        ("autotp_size", "4", "an integer of at least 0"),
        ("autotp_size", 4.0, "an integer of at least 0"),
        ("autotp_size", True, "an integer of at least 0"),
        ("autotp_size", None, "an integer of at least 0"),
        ("autotp_size", 2**40, "an integer of at most 2147483647"),
        ("vocab_parallel_lm_head", 0, "true or false"),
        ("partition_config", [], "a dictionary"),
        ("preset_model", 7, "the name of a preset"),
        ("self_check", "always", "'auto', true or false"),
        ("self_check", 1, "'auto', true or false"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(key: str, value: Any, expected: str) -> None:
    assert message_of(TPTrainingConfig, **{key: value}) == (
        f"tensor_parallel.{key}: got {value!r} ({type(value).__name__}), expected {expected}"
    )


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        (
            "keep_module_on_host",
            True,
            (
                "got True (bool), which is not supported; weights stay on the device where they "
                "are; leave it out"
            ),
        ),
        (
            "kernel_inject",
            True,
            (
                "got True (bool), which is not supported; the kernels it injects are for "
                "inference; leave it out"
            ),
        ),
        (
            "replace_with_kernel_inject",
            True,
            (
                "got True (bool), which is not supported; the kernels it injects are for "
                "inference; leave it out"
            ),
        ),
        (
            "injection_policy_tuple",
            ("o_proj",),
            (
                "got ('o_proj',) (tuple), which is not supported; write the layers as "
                "partition_config.layer_specs"
            ),
        ),
        (
            "vocab_parallel_ce_backend",
            "liger",
            "got 'liger' (str), which is not supported; write 'torch', or leave it out",
        ),
        (
            "vocab_parallel_ce_backend",
            "trch",
            "got 'trch' (str), which is not supported; write 'torch', or leave it out",
        ),
    ],
)
def test_what_is_not_supported_is_refused(key: str, value: Any, text: str) -> None:
    assert message_of(TPTrainingConfig, **{key: value}) == f"tensor_parallel.{key}: {text}"


def test_the_defaults_written_out_are_accepted() -> None:
    assert (
        TPTrainingConfig(
            dtype="fp16",
            autotp_size=0,
            tp_overlap_comm=False,
            vocab_parallel_lm_head=None,
            vocab_parallel_ce_backend="torch",
            tensor_parallel=None,
            injection_policy_tuple=None,
            partition_config=None,
            preset_model=None,
            keep_module_on_host=False,
            replace_with_kernel_inject=False,
            self_check="auto",
        )
        == TPTrainingConfig()
    )
    assert TPTrainingConfig(vocab_parallel_lm_head=False).vocab_parallel_lm_head is False
    assert TPTrainingConfig(vocab_parallel_lm_head=True).vocab_parallel_lm_head is True
    assert not TPTrainingConfig(tp_overlap_comm=False).overlaps
    assert TPTrainingConfig(tp_overlap_comm=True).overlaps and TPTrainingConfig().overlaps


@pytest.mark.parametrize("given", [True, False, "auto"])
def test_the_self_check_has_three_states(given: Any) -> None:
    assert TPTrainingConfig(self_check=given).self_check is given


def test_auto_leaves_a_field_at_its_default_as_in_deepspeed() -> None:
    given = {"autotp_size": "auto", "dtype": "auto", "tp_grain_size": "auto"}
    config = TPTrainingConfig(**given, tp={"tp_size": "auto"})
    assert config == TPTrainingConfig()
    assert "tensor_parallel.autotp_sise" in message_of(TPTrainingConfig, autotp_sise="auto")


def test_all_problems_come_in_one_error() -> None:
    message = message_of(
        get_tensor_parallel_config,
        {
            "tensor_parallel": {
                "autotp_sise": 4,
                "autotp_size": "four",
                "dtype": "bf61",
                "tp_grain_size": 0,
                "tp": {"tp_size": -1, "tp_grian_size": 2},
                "preset_model": "lama",
                "partition_config": {
                    "layer_specs": [{"patterns": ["("]}],
                    "strict_mode": 1,
                },
            }
        },
    )
    lines = message.split("\n  ")
    assert lines[0] == "tensor_parallel has 9 problems:"
    keys = [line.split(":")[0].removeprefix("tensor_parallel.") for line in lines[1:]]
    assert sorted(keys) == sorted(
        [
            "autotp_sise",
            "autotp_size",
            "dtype",
            "tp_grain_size",
            "tp.tp_size",
            "tp.tp_grian_size",
            "preset_model",
            "partition_config.layer_specs[0].patterns[0]",
            "partition_config.strict_mode",
        ]
    )


def test_pydantics_own_way_in_checks_the_same() -> None:
    assert TPTrainingConfig.model_validate({"tp": {"tp_size": 2}}).tensor_parallel.tp_size == 2
    message = message_of(TPTrainingConfig.model_validate, {"autotp_sise": -1})
    assert "tensor_parallel.autotp_sise: unknown key; did you mean 'autotp_size'" in message


def test_the_text_never_speaks_of_pydantic() -> None:
    for make in (lambda: TPTrainingConfig(autotp_size=-1), lambda: TPConfig(tp_size=None)):
        assert "pydantic" not in message_of(make)
        assert "validation error" not in message_of(make)


@pytest.mark.parametrize("section", [4, [], "auto"])
def test_a_section_that_is_no_dictionary_is_refused(section: Any) -> None:
    expected = f"tensor_parallel: got {section!r} ({type(section).__name__}), expected a dictionary"
    assert message_of(get_tensor_parallel_config, {"tensor_parallel": section}) == expected
    assert message_of(deepspeed_section, section) == expected


def test_a_configuration_that_is_no_dictionary_is_refused() -> None:
    assert message_of(get_tensor_parallel_config, "ds.json") == (
        "the configuration: got 'ds.json' (str), expected a dictionary"
    )


def test_an_assignment_is_checked_like_an_argument() -> None:
    config = TPTrainingConfig(autotp_size=2)
    config.autotp_size = 4
    assert config.autotp_size == 4
    assert message_of(setattr, config, "autotp_size", -4) == (
        "tensor_parallel.autotp_size: got -4 (int), expected an integer of at least 0"
    )
    assert message_of(setattr, config, "expert_partition", "heads") == (
        "tensor_parallel.expert_partition: got 'heads' (str), expected 'width', 'experts' or 'auto'"
    )
    assert config.autotp_size == 4
    assert message_of(setattr, config, "autotp_sise", 4).startswith(
        "tensor_parallel.autotp_sise: unknown key; did you mean 'autotp_size'"
    )
    config.tensor_parallel.tp_size = 4
    assert message_of(setattr, config.tensor_parallel, "tp_size", 0).startswith("tp.tp_size: got 0")


def test_reading_changes_nothing_that_was_given() -> None:
    given = {
        "autotp_size": 2,
        "tp_grain_size": 8,
        "tp": {},
        "partition_config": copy.deepcopy(RULES),
    }
    before = copy.deepcopy(given)
    TPTrainingConfig(**given).get_partition_config_object()
    assert given == before


def test_a_section_can_be_written_as_json() -> None:
    config = TPTrainingConfig(dtype="bf16", autotp_size=2)
    written = json.loads(config.model_dump_json())
    assert written["dtype"] == "torch.bfloat16"
    assert TPTrainingConfig(**written) == config


def test_reading_a_configuration_imports_neither_deepspeed_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from deepspeed_autotp.config.training_config import TPTrainingConfig\n"
        "TPTrainingConfig(autotp_size=2, preset_model='llama')\n"
        "assert not {'deepspeed', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_section_is_a_dictionary_and_no_object_that_others_may_write_to() -> None:
    with pytest.raises(ValueError, match="tensor_parallel: got .*, expected a dictionary"):
        get_tensor_parallel_config({"tensor_parallel": TPTrainingConfig(autotp_size=2)})
