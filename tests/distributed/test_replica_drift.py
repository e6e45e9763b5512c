# SPDX-License-Identifier: Apache-2.0
"""While a model trains its ranks notice where what several of them hold has drifted apart."""

import pytest
import torch

from deepspeed_autotp.state.replica_drift import checksum
from tests.distributed import replica_drift_ranks
from tests.distributed.replica_drift_ranks import Change
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool

NORM = "model.layers.1.input_layernorm.weight"
SHARED = "model.layers.0.self_attn.k_proj.weight"
SHARDED = "model.layers.0.mlp.up_proj.weight"
WAYS = pytest.mark.parametrize(
    "zero",
    [None, pytest.param(0, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3],
    ids=["loop", "zero 0", "zero 2", "zero 3"],
)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]
)
def test_a_sign_and_a_last_bit_change_the_checksum(dtype: torch.dtype) -> None:
    values = torch.arange(1.0, 7.0).to(dtype)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for changed in (1, torch.tensor(-0.0, dtype=dtype).view(bits)):
        other = values.clone()
        other.view(bits)[2] ^= changed
        assert int(checksum(other)) != int(checksum(values)) == int(checksum(values.clone()))


@WAYS
def test_equal_ranks_say_nothing(pool: Pool, zero: int | None) -> None:
    for said, error in pool.run(replica_drift_ranks.called, zero, {}, 4, ranks=4):
        assert (said, error) == ([], "nothing")


def test_what_is_behind_the_values_of_a_partition_is_not_compared(pool: Pool) -> None:
    for said, error in pool.run(replica_drift_ranks.partitioned_unevenly, ranks=4):
        assert (said, error) == ([], "nothing")


@WAYS
def test_rounding_that_differs_is_a_warning(pool: Pool, zero: int | None) -> None:
    found = pool.run(replica_drift_ranks.called, zero, {2: Change(NORM, 1e-6)}, 8, ranks=4)
    for rank, (said, error) in enumerate(found):
        assert error == "nothing"
        if rank % 2:
            assert said == []
            continue
        (text,) = said  # not in calls 4 and 8 again
        assert text.startswith(
            "1 parameter that several ranks hold differs by up to 9.5e-07 of the largest value "
            f"between the ranks {[rank, rank + 1]} of the TP group of LlamaForCausalLM in call 4: "
            f"{NORM}; the ranks round otherwise: "
        )
        assert "MKL_CBWR=COMPATIBLE" in text


def test_a_difference_that_has_grown_is_said_again(pool: Pool) -> None:
    changes = {2: Change(NORM, 1e-6), 3: Change(NORM, 1e-6), 7: Change(SHARED, 1e-4)}
    (said, error), (nothing, _) = pool.run(replica_drift_ranks.called, None, changes, 8)
    assert error == "nothing" and nothing == []
    assert ["in call 4: " in said[0], "in call 8: " in said[1], len(said)] == [True, True, 2]
    assert said[1].startswith("2 parameters that several ranks hold differ by up to ")
    assert f": {SHARED}, {NORM}; " in said[1]


@WAYS
def test_another_value_is_an_error_on_every_rank(pool: Pool, zero: int | None) -> None:
    found = pool.run(replica_drift_ranks.called, zero, {3: Change(NORM, 0.5)}, 8, ranks=4)
    for ranks in (found[:2], found[2:]):
        assert all(said == [] for said, _ in ranks)
        text = same_error([error for _, error in ranks])
        assert "differs by up to 5.0e-01 of the largest value between the ranks" in text
        assert f"in call 4: {NORM}; update what several ranks hold in the same way" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_on_one_rank_is_an_error(pool: Pool, value: float) -> None:
    changes = {2: Change(SHARED, float("nan"), 0, everywhere=True), 3: Change(SHARED, value, 2)}
    found = pool.run(replica_drift_ranks.called, None, changes, 4)
    assert "differs by up to inf of the largest value" in same_error([each for _, each in found])


def test_values_that_are_nan_on_all_ranks_are_equal(pool: Pool) -> None:
    changes = {2: Change(SHARED, float("nan"), 0, everywhere=True), 3: Change(SHARED, 1e-6, 2)}
    for rank, (said, error) in enumerate(pool.run(replica_drift_ranks.called, None, changes, 4)):
        assert error == "nothing"
        assert len(said) == (rank == 0)


def test_a_difference_beside_the_sample_is_said_once(pool: Pool) -> None:
    changes = {2: Change(SHARED, 0.5, 1)}  # every other element is sampled
    (said, error), (nothing, _) = pool.run(replica_drift_ranks.called, None, changes, 8)
    assert error == "nothing" and nothing == []
    (text,) = said  # not in call 8 again
    assert "differs in values not sampled between the ranks [0, 1]" in text


def test_shards_may_differ(pool: Pool) -> None:
    for said, error in pool.run(replica_drift_ranks.called, None, {1: Change(SHARDED, 0.5)}, 4):
        assert (said, error) == ([], "nothing")
