# SPDX-License-Identifier: Apache-2.0
"""While a model trains its ranks notice where what several of them hold has drifted apart."""

import pytest

from tests.distributed import replica_drift_ranks
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


@WAYS
def test_equal_ranks_say_nothing(pool: Pool, zero: int | None) -> None:
    for said, error in pool.run(replica_drift_ranks.called, zero, {}, 4, ranks=4):
        assert (said, error) == ([], "nothing")


@WAYS
def test_rounding_that_differs_is_a_warning(pool: Pool, zero: int | None) -> None:
    found = pool.run(replica_drift_ranks.called, zero, {2: (NORM, 1e-6)}, 8, ranks=4)
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
    changes = {2: (NORM, 1e-6), 3: (NORM, 1e-6), 7: (SHARED, 1e-4)}
    (said, error), (nothing, _) = pool.run(replica_drift_ranks.called, None, changes, 8)
    assert error == "nothing" and nothing == []
    assert ["in call 4: " in said[0], "in call 8: " in said[1], len(said)] == [True, True, 2]
    assert said[1].startswith("2 parameters that several ranks hold differ by up to ")
    assert f": {SHARED}, {NORM}; " in said[1]


@WAYS
def test_another_value_is_an_error_on_every_rank(pool: Pool, zero: int | None) -> None:
    found = pool.run(replica_drift_ranks.called, zero, {3: (NORM, 0.5)}, 8, ranks=4)
    for ranks in (found[:2], found[2:]):
        assert all(said == [] for said, _ in ranks)
        text = same_error([error for _, error in ranks])
        assert "differs by up to 5.0e-01 of the largest value between the ranks" in text
        assert f"in call 4: {NORM}; update what several ranks hold in the same way" in text


def test_shards_may_differ(pool: Pool) -> None:
    for said, error in pool.run(replica_drift_ranks.called, None, {1: (SHARDED, 0.5)}, 4):
        assert (said, error) == ([], "nothing")
