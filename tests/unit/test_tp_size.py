# SPDX-License-Identifier: Apache-2.0
"""The TP size: what states it, and what it has to fit."""

from typing import Any

import pytest

from deepspeed_autotp.config.tp_size import (
    check_engine_tp_size,
    consecutive_ranks,
    settle_tp_size,
    stated_size,
)
from deepspeed_autotp.config.training_config import TPTrainingConfig


def settled(config: dict[str, Any], **given: Any) -> int:
    arguments = {"tp_size": None, "group_ranks": None, "ranks": 4, **given}
    named = {"called": "parallelize", "group_key": "tp_group"}
    return settle_tp_size(TPTrainingConfig(**config), **{**arguments, **named})


def check(size: int, nested: int = 1, **given: Any) -> None:
    arguments = {
        "rank": 2,
        "ranks": 4,
        "sharded_over": None,
        "engine_ranks": None,
        "has_mpu": False,
    }
    settings = TPTrainingConfig(autotp_size=size, tp={"tp_size": nested})
    check_engine_tp_size(settings, **{**arguments, **given})


@pytest.mark.parametrize(
    ("config", "given"),
    [
        ({}, {"tp_size": 2}),
        ({}, {"group_ranks": 2}),
        ({"autotp_size": 2}, {}),
        ({"tp": {"tp_size": 2}}, {}),
        ({"autotp_size": 2, "tp": {"tp_size": 2}}, {"tp_size": 2, "group_ranks": 2}),
    ],
)
def test_every_source_states_the_tp_size(config: dict[str, Any], given: dict[str, Any]) -> None:
    assert settled(config, **given) == 2


def test_zero_leaves_the_model_unsharded() -> None:
    assert settled({"autotp_size": 0}) == settled({"autotp_size": 0}, tp_size=1) == 1


def test_sources_that_differ_are_named() -> None:
    with pytest.raises(ValueError) as caught:
        settled({"autotp_size": 4, "tp": {"tp_size": 8}}, tp_size=2, group_ranks=2)
    assert str(caught.value) == (
        "TP size: tp_size of parallelize is 2, the size of the TP group is 2, but "
        "config.autotp_size is 4, config.tp.tp_size is 8; give it in one place, or the same size "
        "everywhere"
    )


def test_a_tp_size_has_to_divide_the_ranks_unless_the_group_is_given() -> None:
    assert settled({}, group_ranks=3) == 3
    with pytest.raises(ValueError) as caught:
        settled({}, tp_size=3)
    assert str(caught.value) == (
        "parallelize: the TP size is 3, which does not divide the 4 ranks of this run; sizes that "
        "fit: 1, 2, 4"
    )


def test_no_tp_size_at_all_is_refused() -> None:
    with pytest.raises(
        ValueError, match="no TP size is given; pass tp_size, tp_group, mesh or config"
    ):
        settled({"preset_model": "llama"})


@pytest.mark.parametrize("value", [0, -2, True, 2.0, "2"])
def test_a_tp_size_that_is_no_number_of_ranks_is_refused(value: object) -> None:
    with pytest.raises(
        ValueError, match="parallelize: tp_size: got .*, expected a number of ranks"
    ):
        settled({}, tp_size=value)


def test_a_size_that_is_left_out_is_not_stated() -> None:
    assert (
        stated_size({}, "tp_size", "tp") == stated_size({"tp_size": "auto"}, "tp_size", "tp") == -1
    )
    assert stated_size({"tp_size": 0}, "tp_size", "tp") == 0
    with pytest.raises(ValueError, match=r"tp\.tp_size: got True \(bool\), expected a number of r"):
        stated_size({"tp_size": True}, "tp_size", "tp")


def test_the_ranks_of_an_engine_are_consecutive() -> None:
    assert [consecutive_ranks(2, rank) for rank in (0, 1, 2)] == [[0, 1], [0, 1], [2, 3]]
    assert consecutive_ranks(0, 3) == [3]


def test_an_engine_takes_a_tp_size_that_fits() -> None:
    check(0)
    check(2, 2, sharded_over=(2, 3), engine_ranks=2)
    check(1, engine_ranks=2, has_mpu=True)


@pytest.mark.parametrize(
    ("size", "given", "text"),
    [
        (
            0,
            {"nested": 2},
            "tp_size is 2, but autotp_size, which switches tensor parallelism on, is",
        ),
        (3, {}, "tensor_parallel.autotp_size is 3, which does not divide the 4 ranks of this run"),
        (
            2,
            {"sharded_over": (0, 2)},
            "uses the ranks [2, 3], but the model is sharded over the ranks",
        ),
        (2, {"engine_ranks": 4}, "autotp_size is 2, but DeepSpeed has groups of 4 ranks"),
        (0, {"engine_ranks": 4}, "or initialize it in another process, or before the sharded one"),
    ],
)
def test_an_engine_refuses_a_tp_size_that_does_not_fit(
    size: int, given: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError) as caught:
        check(size, **given)
    assert text in str(caught.value)
