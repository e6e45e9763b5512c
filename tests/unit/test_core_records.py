# SPDX-License-Identifier: Apache-2.0
"""Recorded arguments and their merging, as Python sees them."""

import pytest

from deepspeed_autotp import _core
from deepspeed_autotp._core import Records


def test_records_are_found_by_key_and_age() -> None:
    records = Records()
    assert records.latest() is None and records.find(1) is None and len(records) == 0
    records.add(1, 2, "bf16")
    records.add(2, 2, "torch.bfloat16")
    assert records.find(1) == (2, "bfloat16", 0, 0)
    assert records.latest() == (2, (2, "bfloat16", 0, 0))
    records.remove(2)
    records.remove(7)
    assert records.latest() == (1, (2, "bfloat16", 0, 0))
    records.clear()
    assert len(records) == 0


def test_a_record_keeps_its_group() -> None:
    records = Records()
    records.add(-5, 4, "half", group=1 << 62, group_size=4)
    assert records.find(-5) == (4, "float16", 1 << 62, 4)


def test_a_record_that_conflicts_names_both_values() -> None:
    records = Records()
    records.add(1, 2, "bf16")
    with pytest.raises(ValueError, match=r"(?s)tp_size: 4 .* 2 .*dtype: float16 .* bfloat16"):
        records.add(2, 4, "fp16")
    assert len(records) == 1


def test_records_name_the_argument_that_is_wrong() -> None:
    records = Records()
    with pytest.raises(TypeError, match="key: expected an int, got str"):
        records.add("1", 2, "bf16")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype: expected a str, got None"):
        records.add(1, 2, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype: 'bf1' .*'bf16'"):
        records.add(1, 2, "bf1")
    with pytest.raises(ValueError, match="tp_size is 0"):
        records.add(1, 0, "bf16")
    assert len(records) == 0


def test_merge_fills_what_is_missing() -> None:
    filled = _core.merge((4, "bfloat16", 0, 0), autotp_size=4)
    assert filled == {
        "autotp_size": None,
        "tp_size": 4,
        "tp_group": False,
        "make_groups": True,
    }


def test_merge_lists_all_conflicts_in_one_error() -> None:
    with pytest.raises(ValueError, match="conflicts") as caught:
        _core.merge((4, "bfloat16", 0, 0), autotp_size=2, tp_size=8, fp16=True)
    assert "autotp_size is 2, but tensor_parallel.tp.tp_size is 8" in str(caught.value)
    assert "fp16" in str(caught.value)


def test_a_tp_size_is_settled_where_all_sources_agree() -> None:
    assert _core.settle_tp_size([("a", 4), ("b", -1), ("c", 4)]) == 4
    assert _core.settle_tp_size((("a", 0), ("b", 1))) == 1
    assert _core.settle_tp_size([("a", -1)]) is None
    assert _core.settle_tp_size([]) is None


def test_sources_that_differ_about_the_tp_size_are_all_named() -> None:
    with pytest.raises(ValueError) as caught:
        _core.settle_tp_size([("a", 4), ("b", 4), ("c", 2), ("d", 4)])
    assert str(caught.value) == (
        "TP size: a is 4, b is 4, d is 4, but c is 2; give it in one place, or the same size "
        "everywhere"
    )


def test_sources_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match="sources: expected tuples .*, got list"):
        _core.settle_tp_size([["a", 4]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="a: expected an int, got bool"):
        _core.settle_tp_size([("a", True)])
    with pytest.raises(TypeError, match="sources"):
        _core.settle_tp_size(4)  # type: ignore[arg-type]


def test_merge_names_the_argument_that_is_wrong() -> None:
    with pytest.raises(TypeError, match="record: expected a tuple .*, got list"):
        _core.merge([4, "bfloat16", 0, 0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="record: expected a tuple .*, got 2 items"):
        _core.merge((4, "bfloat16"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bf16: expected True or False, got str"):
        _core.merge(None, bf16="auto")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype: expected a str or None, got int"):
        _core.merge(None, dtype=16)  # type: ignore[arg-type]
