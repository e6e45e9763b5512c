# SPDX-License-Identifier: Apache-2.0
"""Layer specifications, their lists, presets and merging."""

import copy
import enum
import logging
import pickle
from typing import Any

import pytest
from deepspeed.module_inject import autotp_config as deepspeed_config

from deepspeed_autotp import _core
from deepspeed_autotp.config.autotp_config import (
    AutoTPConfig,
    AutoTPPresets,
    build_rules,
    merge_autotp_configs,
)
from deepspeed_autotp.config.layer_spec import PartitionType
from deepspeed_autotp.config.layer_spec import TPLayerSpec as TypedSpec
from tests.support.value_error import message_of

# Lists and names are accepted where the annotations name tuples and members.
TPLayerSpec: Any = TypedSpec

QUERY = "model.layers.0.self_attn.q_proj.weight"
PRESETS = ("llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3")


def test_a_spec_has_deepspeeds_defaults_and_order() -> None:
    ours = TPLayerSpec([".*"])
    theirs = deepspeed_config.TPLayerSpec([".*"])
    for name, value in vars(theirs).items():
        mine = vars(ours)[name]
        assert (mine.value if isinstance(mine, enum.Enum) else mine) == (
            value.value if isinstance(value, enum.Enum) else value
        )
    placed = TPLayerSpec(["a"], PartitionType.COLUMN, ((4, 2), -1), 0, ["llama"], True, False)
    assert (placed.shape, placed.partition_dim, placed.model_types) == (((4, 2), -1), 0, ["llama"])
    assert placed.gather_output and not placed.grad_allreduce


def test_a_config_has_deepspeeds_defaults() -> None:
    assert vars(AutoTPConfig()) == vars(deepspeed_config.AutoTPConfig())
    assert AutoTPConfig.from_dict({}) == AutoTPConfig()


@pytest.mark.parametrize(
    "given", ["row", "ROW", "Row", PartitionType.ROW, deepspeed_config.PartitionType.ROW]
)
def test_a_partition_type_may_be_spelled_in_any_usual_way(given: Any) -> None:
    assert TPLayerSpec(["a"], partition_type=given).partition_type is PartitionType.ROW


@pytest.mark.parametrize("given", ["rows", "", None, 1])
def test_an_unknown_partition_type_is_refused(given: Any) -> None:
    assert message_of(TPLayerSpec, ["a"], given) == (
        f"TPLayerSpec.partition_type: got {given!r} ({type(given).__name__}), "
        "expected 'column', 'row' or 'skip'"
    )


def test_lists_in_a_shape_become_tuples() -> None:
    assert TPLayerSpec(["a"], shape=[2, -1]).shape == (2, -1)
    assert TPLayerSpec(["a"], shape=[[8, 2, 2], -1]).shape == ((8, 2, 2), -1)
    assert TPLayerSpec(["a"], shape=((8, 2, 2), -1)).shape == ((8, 2, 2), -1)


SHAPES: list[tuple[Any, str, int | None]] = [
    (None, "column", None),
    ([2, -1], "column", None),
    ([2, -1], "row", None),
    ([-1, 2], "row", None),
    ([[8, 2, 2], -1], "column", None),
    ([-1, [3, 5]], "row", None),
    ([4, -1, 16], "column", 1),
]


@pytest.mark.parametrize(("shape", "kind", "dim"), SHAPES)
def test_the_pieces_are_those_of_deepspeed(shape: Any, kind: str, dim: int | None) -> None:
    ours = TPLayerSpec(["a"], kind, shape, dim)
    theirs = deepspeed_config.TPLayerSpec(["a"], kind, shape, dim)
    assert ours.get_partition_dim() == theirs.get_partition_dim()
    assert ours.has_unequal_sub_params() == theirs.has_unequal_sub_params()
    assert ours.get_sub_param_sizes() == theirs.get_sub_param_sizes()
    assert ours.get_num_sub_params() == theirs.get_num_sub_params()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"shape": [2]}, None),
        ({"shape": [2], "partition_type": "row"}, "partition_dim is 1, but shape has 1 dimension"),
        ({"shape": [0, -1]}, "shape[0]"),
        ({"shape": [-2, -1]}, "shape[0] is -2"),
        ({"shape": [[4, 0], -1]}, "shape[0][1] is 0"),
        ({"shape": [-1, [4, 4]]}, "a list can stand there only"),
        ({"shape": [[4, [2, 2]], -1]}, "shape[0][1]: got [2, 2] (list), expected an integer"),
        ({"shape": ["4", -1]}, "shape[0]: got '4' (str), expected an integer"),
        ({"shape": [True, -1]}, "shape[0]: got True (bool), expected an integer"),
        ({"shape": [2**63, -1]}, "shape[0]: got 9223372036854775808 (int), expected an"),
        ({"shape": 2}, "shape: got 2 (int), expected a list of integers"),
        ({"shape": "2, -1"}, "shape: got '2, -1' (str), expected a list of integers"),
        ({"partition_dim": -1}, "partition_dim: got -1 (int), expected an integer of at least 0"),
        ({"partition_dim": 2**31}, "expected an integer of at most 2147483647"),
        ({"partition_dim": True}, "partition_dim: got True (bool)"),
        ({"partition_dim": 2, "shape": [2, -1]}, "partition_dim is 2, but shape has 2 dimensions"),
        ({"gather_output": "yes"}, "gather_output: got 'yes' (str), expected true or false"),
        ({"gather_output": True, "partition_type": "row"}, "gather_output needs partition_type"),
        ({"grad_allreduce": True}, "grad_allreduce"),
        ({"partition_type": "skip", "partition_dim": 0}, "partition_dim has no effect"),
        ({"model_types": "llama"}, "model_types: got 'llama' (str), expected a list of model"),
        ({"model_types": [1]}, "model_types[0]: got 1 (int), expected a string"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(fields: dict[str, Any], said: str | None) -> None:
    if said is None:
        assert TPLayerSpec(["a"], **fields).shape == (2,)
        return
    message = message_of(TPLayerSpec, ["a"], **fields)
    assert message.startswith("TPLayerSpec")
    assert said in message
    assert "\n" not in message


def test_a_single_string_for_patterns_is_told_to_become_a_list() -> None:
    assert message_of(TPLayerSpec, ".*q_proj") == (
        "TPLayerSpec.patterns: got '.*q_proj' (str), expected a list of patterns; "
        "write ['.*q_proj']"
    )


def test_no_pattern_at_all_is_refused() -> None:
    expected = "TPLayerSpec.patterns: got [] (list), expected at least one pattern"
    assert message_of(TPLayerSpec, []) == expected


def test_a_pattern_that_does_not_compile_is_named_with_its_position() -> None:
    message = message_of(TPLayerSpec, ["fine", "(q_proj"])
    assert message.startswith("TPLayerSpec.patterns[1]: ")
    assert "'(q_proj'" in message and "position 0" in message


def test_all_problems_of_a_spec_come_together() -> None:
    message = message_of(TPLayerSpec, ["(", 3], "rwo", gather_output=1)
    assert message.startswith("TPLayerSpec has 3 problems:\n  TPLayerSpec.patterns[1]: ")
    assert "\n  TPLayerSpec.partition_type: " in message
    assert "\n  TPLayerSpec.gather_output: got 1 (int)" in message


NAMES = [QUERY, "q_proj", "x.q_proj.weight\n", "", "\u00e9.q_proj.weight", "model.norm.weight"]


@pytest.mark.parametrize(
    "pattern", [r".*q_proj", r"q_proj$", r".*\.weight$", r"(?i)MODEL", "", r"^m.*t\Z"]
)
@pytest.mark.parametrize("model_types", [None, [], ["llama"], ["LLAMA", "phi3"]])
@pytest.mark.parametrize("model_type", [None, "llama", "Llama", "gpt2"])
def test_a_spec_matches_what_deepspeeds_matches(
    pattern: str, model_types: list[str] | None, model_type: str | None
) -> None:
    ours = TPLayerSpec([pattern, "lm_head"], model_types=model_types)
    theirs = deepspeed_config.TPLayerSpec([pattern, "lm_head"], model_types=model_types)
    for name in NAMES:
        assert ours.matches(name, model_type) == theirs.matches(name, model_type)


def test_the_first_spec_decides_and_a_warning_names_all(caplog: pytest.LogCaptureFixture) -> None:
    first, second = TPLayerSpec([".*q_proj.*"], "row"), TPLayerSpec([".*weight"])
    config = AutoTPConfig(layer_specs=[TPLayerSpec(["nothing"]), first, second])
    with caplog.at_level(logging.WARNING, logger="deepspeed_autotp"):
        assert config.find_matching_spec(QUERY) is first
    (record,) = caplog.records
    assert record.name == "deepspeed_autotp"
    assert record.getMessage() == (
        f"parameter {QUERY} matches 2 layer_specs, and the first decides: "
        "['.*q_proj.*']; ['.*weight']"
    )
    caplog.clear()
    assert config.find_matching_spec("model.norm.weight") is second
    assert config.find_matching_spec("model.norm.bias") is None
    assert not caplog.records


def test_a_dictionary_reads_as_deepspeed_reads_it() -> None:
    given = {
        "tp_size": 4,
        "layer_specs": [
            {"patterns": [".*o_proj"], "partition_type": "ROW", "model_types": ["llama"]},
            {"patterns": [".*qkv"], "shape": [[8, 2, 2], -1], "partition_dim": 0},
            {"patterns": [".*gate$"], "partition_type": "skip", "grad_allreduce": True},
            {"patterns": ["lm_head"], "gather_output": True},
        ],
        "embedding_partition_dim": 0,
        "lm_head_patterns": ["output"],
        "use_default_specs": False,
        "strict_mode": True,
    }
    ours, theirs = AutoTPConfig.from_dict(given), deepspeed_config.AutoTPConfig.from_dict(given)
    for key in (
        "tp_size",
        "embedding_partition_dim",
        "lm_head_patterns",
        "use_default_specs",
        "strict_mode",
    ):
        assert vars(ours)[key] == vars(theirs)[key] == given[key]
    for mine, their in zip(ours.layer_specs, theirs.layer_specs, strict=True):
        assert mine.partition_type.value == their.partition_type.value
        for key in (
            "patterns",
            "shape",
            "partition_dim",
            "model_types",
            "gather_output",
            "grad_allreduce",
        ):
            assert vars(mine)[key] == vars(their)[key]


def test_every_problem_of_a_dictionary_comes_with_its_path() -> None:
    message = message_of(
        AutoTPConfig.from_dict,
        {
            "tp_sise": 2,
            "strict_mode": "yes",
            "layer_specs": [
                {"patterns": ["a"], "partition_typ": "row"},
                {"partition_type": "row"},
                {"patterns": "a"},
                "row",
                {"patterns": ["a"], "shape": [0, -1]},
                {1: 2},
            ],
        },
    )
    lines = message.split("\n  ")
    assert lines[0] == "partition_config has 8 problems:"
    assert lines[1].startswith(
        "partition_config.layer_specs[0].partition_typ: unknown key; did you mean 'partition_type'"
    )
    assert lines[2] == (
        "partition_config.layer_specs[1].patterns: is missing and has no default; write it"
    )
    assert lines[3].endswith("write ['a']")
    assert lines[4] == "partition_config.layer_specs[3]: got 'row' (str), expected a dictionary"
    assert lines[5].startswith("partition_config.layer_specs[4]: shape[0]")
    assert lines[6] == (
        "partition_config.layer_specs[5]: got a dictionary with the key 1 (int), "
        "expected strings as keys"
    )
    assert lines[7] == "partition_config.strict_mode: got 'yes' (str), expected true or false"
    assert lines[8] == "partition_config.tp_sise: unknown key; did you mean 'tp_size'?"


def test_a_key_that_resembles_nothing_gets_the_whole_list() -> None:
    assert message_of(AutoTPConfig.from_dict, {"zzzzzzzzzzzz": 1}) == (
        "partition_config.zzzzzzzzzzzz: unknown key; known: tp_size, layer_specs, "
        "embedding_partition_dim, lm_head_patterns, use_default_specs, strict_mode"
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("tp_size", -1, "an integer of at least 0"),
        ("tp_size", 2.0, "an integer of at least 0"),
        ("tp_size", "2", "an integer of at least 0"),
        ("embedding_partition_dim", 2, "0 (vocabulary) or 1 (hidden)"),
        ("embedding_partition_dim", [0], "0 (vocabulary) or 1 (hidden)"),
        ("lm_head_patterns", "lm_head", "a list of names; write ['lm_head']"),
        ("use_default_specs", 1, "true or false"),
        ("layer_specs", {}, "a list of dictionaries"),
        ("layer_specs", None, "a list of dictionaries"),
    ],
)
def test_a_wrong_value_in_a_dictionary_is_refused(key: str, value: Any, expected: str) -> None:
    assert message_of(AutoTPConfig.from_dict, {key: value}) == (
        f"partition_config.{key}: got {value!r} ({type(value).__name__}), expected {expected}"
    )


def test_what_is_no_dictionary_is_refused() -> None:
    assert message_of(AutoTPConfig.from_dict, [1]) == (
        "partition_config: got [1] (list), expected a dictionary"
    )


def test_dictionaries_as_layer_specs_are_told_of_from_dict() -> None:
    message = message_of(AutoTPConfig, layer_specs=[{}])
    assert message == (
        "AutoTPConfig.layer_specs[0]: got {} (dict), expected TPLayerSpec; "
        "AutoTPConfig.from_dict reads dictionaries"
    )


def test_merging_puts_the_overriding_specs_first() -> None:
    base = AutoTPConfig(tp_size=4, layer_specs=[TPLayerSpec(["base"])], strict_mode=True)
    custom = AutoTPConfig(
        layer_specs=[TPLayerSpec(["custom"])], embedding_partition_dim=0, lm_head_patterns=[]
    )
    merged = merge_autotp_configs(base, custom)
    assert [spec.patterns for spec in merged.layer_specs] == [["custom"], ["base"]]
    assert merged.tp_size == 4
    assert merged.embedding_partition_dim == 0
    assert merged.lm_head_patterns == ["lm_head", "embed_out"]
    assert not merged.strict_mode
    assert merge_autotp_configs(base, AutoTPConfig(tp_size=2)).tp_size == 2


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_matches_the_parameters_of_deepspeeds(name: str) -> None:
    ours = AutoTPPresets.get_preset(name)
    theirs = deepspeed_config.AutoTPPresets.get_preset(name)
    described = [(spec.patterns, spec.partition_type.value) for spec in ours.layer_specs]
    assert described == [(spec.patterns, spec.partition_type.value) for spec in theirs.layer_specs]
    assert ours == vars(AutoTPPresets)[name]()
    assert ours == AutoTPPresets.get_preset(name.upper())


def test_the_table_has_exactly_the_documented_presets() -> None:
    assert _core.preset_names() == PRESETS


def test_a_fused_query_key_value_is_not_sharded_in_thirds() -> None:
    for preset in (AutoTPPresets.phi3(), AutoTPPresets.chatglm()):
        shapes = {spec.shape for spec in preset.layer_specs}
        assert shapes == {None, (2, -1)}


def test_an_unknown_preset_names_the_nearest() -> None:
    assert message_of(AutoTPPresets.get_preset, "lama").startswith(
        "preset_model: unknown preset 'lama'; did you mean 'llama'"
    )
    assert message_of(AutoTPPresets.get_preset, 3) == ("preset_model: got 3 (int), expected a name")


def test_llama_gqa_shards_the_fused_weight_as_deepspeed_does() -> None:
    ours = AutoTPPresets.llama_gqa(8, 2, 64)
    theirs = deepspeed_config.AutoTPPresets.llama_gqa(8, 2, 64)
    assert [
        (spec.patterns, spec.partition_type.value, spec.shape) for spec in ours.layer_specs
    ] == [(spec.patterns, spec.partition_type.value, spec.shape) for spec in theirs.layer_specs]
    assert ours.layer_specs[1].shape == ((512, 128, 128), -1)


def test_llama_gqa_refuses_counts_that_are_none() -> None:
    message = message_of(AutoTPPresets.llama_gqa, 8, 0, "64")
    assert "AutoTPPresets.llama_gqa.num_kv_heads: got 0 (int)" in message
    assert "AutoTPPresets.llama_gqa.head_dim: got '64' (str)" in message


def test_rules_keep_the_order_and_the_model_types() -> None:
    config = AutoTPConfig(
        layer_specs=[
            TPLayerSpec([".*q_proj"], model_types=["phi3"]),
            TPLayerSpec(["nothing", ".*q_proj"], "row"),
            *AutoTPPresets.llama().layer_specs,
        ]
    )
    rules = build_rules(config)
    assert len(rules) == 6
    assert rules.find(QUERY) == (1, 3)
    assert rules.find(QUERY, None, "phi3") == (0, 1, 3)


def plan_of_query(config: AutoTPConfig) -> _core.Plan:
    modules: list[tuple[str, str, str, dict[str, int]]] = [("", "Model", "other", {})]
    parts = QUERY.split(".")[:-1]
    for depth in range(1, len(parts) + 1):
        kind = "linear" if depth == len(parts) else "other"
        modules.append((".".join(parts[:depth]), "Module", kind, {}))
    parameter = (QUERY, "weight", len(modules) - 1, (8, 4), "float32", 4, -1)
    return _core.Plan(_core.Model(modules, [parameter]), build_rules(config), ranks=2)


def test_a_plan_says_whether_a_user_or_a_preset_decided() -> None:
    preset = AutoTPPresets.llama()
    (entry,) = plan_of_query(preset).entries
    assert (entry.source, entry.rule, entry.kind) == ("preset", "preset llama[1]", "column")
    custom = AutoTPConfig(layer_specs=[TPLayerSpec(["x"]), TPLayerSpec([".*q_proj"], "row")])
    (entry,) = plan_of_query(merge_autotp_configs(preset, custom)).entries
    assert (entry.source, entry.rule, entry.kind) == ("partition_config", "layer_specs[1]", "row")


def test_the_shape_and_the_dimension_reach_the_plan() -> None:
    fused = AutoTPConfig(layer_specs=[TPLayerSpec([".*q_proj"], shape=[[4, 2, 2], -1])])
    (entry,) = plan_of_query(fused).entries
    assert entry.runs(0) == (0, 2, 4, 1, 6, 1)
    assert entry.runs(1) == (2, 2, 5, 1, 7, 1)


def test_specs_can_be_copied_compared_and_pickled() -> None:
    config = AutoTPPresets.phi3()
    assert config.layer_specs[0].matches("model.layers.0.self_attn.o_proj.weight")
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert other is not config
    mine = TPLayerSpec(config.layer_specs[0].patterns, "row")
    assert mine == config.layer_specs[0]
    assert repr(mine) == repr(config.layer_specs[0])
    assert "_source" not in repr(mine)


def test_an_error_with_several_problems_survives_pickling() -> None:
    with pytest.raises(ValueError) as caught:
        TPLayerSpec([], "rwo")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert type(again) is type(caught.value)


def test_a_wrong_call_names_the_class_and_a_wrong_value_is_shown_as_given() -> None:
    with pytest.raises(TypeError, match="TPLayerSpec: missing a required argument: 'patterns'"):
        TPLayerSpec()  # type: ignore[call-arg]
    assert "got 'COLUM' (str), expected 'column', 'row' or 'skip'" in message_of(
        TPLayerSpec, ["a"], partition_type="COLUM"
    )
