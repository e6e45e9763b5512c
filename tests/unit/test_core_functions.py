# SPDX-License-Identifier: Apache-2.0
"""The functions of the compiled core that belong to no type."""

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import pytest

from deepspeed_autotp import _core


def test_split_gives_the_remainder_to_the_first_ranks() -> None:
    assert _core.split(10, 1, 4) == (3, 3, 2, 2)
    assert _core.split(96, unit=32, ranks=2) == (64, 32)


def test_split_refuses_what_the_unit_does_not_divide() -> None:
    with pytest.raises(ValueError, match="97 is not a multiple of unit 32"):
        _core.split(97, 32, 2)


def test_split_grain_keeps_every_element() -> None:
    assert _core.split_grain(97, 32, 2) == (64, 33)
    with pytest.raises(ValueError, match="2"):
        _core.split_grain(2, 1, 4)


@pytest.mark.parametrize("function", [_core.split, _core.split_grain])
def test_a_split_names_the_argument_that_is_wrong(
    function: Callable[..., tuple[int, ...]],
) -> None:
    with pytest.raises(TypeError, match="size: expected an int, got str"):
        function("4", 1, 2)
    with pytest.raises(TypeError, match="ranks: expected an int, got bool"):
        function(4, 1, True)
    with pytest.raises(ValueError, match="size: the int does not fit in 64 bits"):
        function(1 << 64, 1, 2)
    with pytest.raises(ValueError, match="ranks: 4294967296 does not fit in 32 bits"):
        function(4, 1, 1 << 32)
    with pytest.raises(ValueError, match="ranks"):
        function(4, 1, 0)
    with pytest.raises(ValueError, match="ranks: 2000000 is more than"):
        function(4_000_000, 1, 2_000_000)


def test_nearest_names_come_nearest_first() -> None:
    assert _core.nearest("lama", ["qwen2", "llama", "lamb"]) == ("llama", "lamb")
    assert _core.nearest("lama", ["qwen2", "llama", "lamb"], limit=1) == ("llama",)
    assert _core.nearest("lama", ["llama"], limit=0) == ()
    assert _core.nearest("lama", ()) == ()


def test_nearest_names_the_argument_that_is_wrong() -> None:
    with pytest.raises(TypeError, match="names: expected a list or tuple, got str"):
        _core.nearest("a", "abc")
    with pytest.raises(TypeError, match=r"names\[1\]: expected a str, got None"):
        _core.nearest("a", ["a", None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="limit: -1 is negative"):
        _core.nearest("a", ["a"], -1)


@pytest.mark.parametrize("spelling", ["bf16", "torch.bfloat16", "BFloat16", " bfloat16 "])
def test_every_spelling_of_a_dtype_has_one_name(spelling: str) -> None:
    assert _core.dtype_name(spelling, "dtype") == "bfloat16"


def test_an_unknown_dtype_says_where_it_stands() -> None:
    with pytest.raises(ValueError, match=r"^tensor_parallel\.dtype: .*bflot16.*bfloat16"):
        _core.dtype_name("bflot16", "tensor_parallel.dtype")
    with pytest.raises(TypeError, match="^here: expected a str, got int"):
        _core.dtype_name(16, "here")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bf16", "fp16", "expected"),
    [(True, True, "bfloat16"), (False, True, "float16"), (False, False, None)],
)
def test_bf16_wins_over_fp16(bf16: bool, fp16: bool, expected: str | None) -> None:
    assert _core.precision(bf16, fp16) == expected


def test_auto_is_no_switch() -> None:
    with pytest.raises(TypeError, match="bf16: expected True or False, got str"):
        _core.precision("auto", False)  # type: ignore[arg-type]


def test_core_info_names_pcre2() -> None:
    info = _core.core_info()
    assert info["pcre2"].startswith("10.")
    assert isinstance(info["jit"], bool)


DEFAULT = {
    "partition_type": "column",
    "partition_dim": None,
    "shape": None,
    "gather_output": False,
    "split_input": False,
    "sum_gradient": False,
}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"partition_type": "row", "split_input": True},
        {"partition_type": "skip", "sum_gradient": True},
        {"shape": (2, -1), "gather_output": True},
        {"shape": ((64, 16, 16), -1), "partition_dim": 0},
        {"shape": (8, -1, 64), "partition_dim": 1},
    ],
)
def test_a_spec_comes_back_with_every_key(given: dict[str, Any]) -> None:
    checked = _core.check_spec(given, "here")
    assert checked == DEFAULT | given
    assert _core.check_spec(checked, "here") == checked


def test_a_spec_can_be_any_mapping_and_a_shape_any_list() -> None:
    given = MappingProxyType({"shape": [[4, 2], -1], "partition_type": "COLUMN"})
    assert _core.check_spec(given, "here")["shape"] == ((4, 2), -1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shap": [2, -1]}, "unknown key 'shap'; did you mean 'shape'"),
        ({"partition_type": "colum"}, "partition_type: unknown .*'colum'.*'column'"),
        ({"partition_dim": -1}, "partition_dim: -1 is negative; .* None"),
        ({"partition_dim": 8}, "partition_dim is 8"),
        ({"shape": [0, -1]}, r"shape\[0\]: 0 is no size"),
        ({"shape": []}, "shape: has 0 dimensions"),
        ({"shape": [1] * 9}, "shape: has 9 dimensions"),
        ({"shape": [[], 2]}, r"shape\[0\]: a list of 0 pieces"),
        ({"shape": [[1] * 65, 2]}, r"shape\[0\]: a list of 65 pieces"),
        ({"shape": [[1, 2], [3]]}, r"shape\[1\]: a second list"),
        ({"shape": [-1, [1, 2]]}, r"shape\[1\] is a list of pieces"),
        ({"shape": [[1, 0], -1]}, r"shape\[0\]\[1\] is 0"),
        ({"gather_output": True, "partition_type": "row"}, "gather_output needs"),
        (
            {"partition_type": "skip", "shape": [2, -1]},
            "partition_type 'skip' replicates the weight",
        ),
    ],
)
def test_a_wrong_value_in_a_spec_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^layer_specs\[2\]: {message}"):
        _core.check_spec(given, "layer_specs[2]")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected a dict, got list"),
        ("column", "expected a dict, got str"),
        ({3: 4}, "key: expected a str, got int"),
        ({"partition_type": 3}, "partition_type: expected a str, got int"),
        ({"partition_dim": "0"}, "partition_dim: expected an int, got str"),
        ({"partition_dim": True}, "partition_dim: expected an int, got bool"),
        ({"shape": "2,-1"}, "shape: expected a list or tuple, got str"),
        ({"shape": {2: -1}}, "shape: expected a list or tuple, got dict"),
        ({"shape": [2.0, -1]}, r"shape\[0\]: expected an int or a list of ints, got float"),
        ({"shape": [[[1]], -1]}, r"shape\[0\]: item 0: expected an int, got list"),
        ({"gather_output": 1}, "gather_output: expected True or False, got int"),
    ],
)
def test_a_wrong_type_in_a_spec_is_named(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"^here: {message}"):
        _core.check_spec(given, "here")


def test_every_preset_row_is_a_spec_that_passes() -> None:
    assert {"llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3"} == set(
        _core.preset_names()
    )
    for name in _core.preset_names():
        rows = _core.preset_rows(name)
        assert rows
        for pattern, spec in rows:
            assert _core.check_spec(spec, pattern) == spec


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="'lama'; did you mean 'llama'"):
        _core.preset_rows("lama")


def test_every_style_of_the_table_is_a_spec_or_says_that_it_shards_no_weight() -> None:
    names = _core.style_names()
    assert {"colwise", "rowwise", "moe_tp_experts"} < set(names) and len(names) == len(set(names))
    for name in names:
        try:
            assert _core.check_spec(_core.style_spec(name, "x"), "x")
        except ValueError as error:
            assert f"'{name}' is a transformers style that shards no weight" in str(error)


def test_a_style_is_a_spec() -> None:
    assert _core.style_spec("colwise", "q_proj") == DEFAULT
    assert _core.style_spec("rowwise", "o_proj")["partition_type"] == "row"
    with pytest.raises(ValueError, match=r"layers\.\*\.q_proj.*'colwis'.*'colwise'"):
        _core.style_spec("colwis", "layers.*.q_proj")


def test_a_shape_may_change_its_spec_while_it_is_read() -> None:
    class Clearing(list[int]):
        def __iter__(self) -> Iterator[int]:
            spec.clear()
            self.others = ["".join(["x", str(number), "yyy"]) for number in range(100)]
            return iter([0, -1])

    spec = {"".join(["sha", "pe"]): Clearing([2, -1])}  # a key that nothing else refers to
    with pytest.raises(ValueError, match=r"^here: shape\[0\]: 0 is no size"):
        _core.check_spec(spec, "here")
