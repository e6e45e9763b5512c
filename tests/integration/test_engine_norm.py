# SPDX-License-Identifier: Apache-2.0
"""The gradient norm of an engine is that of one process, and every rank takes the same decision."""

from typing import Any

import pytest

from tests.integration import engine_norm_ranks
from tests.integration.engine_norm_ranks import Case
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool

ONE_KEY: dict[str, Any] = {"num_key_value_heads": 1}
MULTI_QUERY: dict[str, Any] = {"multi_query": True, "new_decoder_architecture": False}
# Every optimizer that DeepSpeed wraps another in.
WRAPPERS = [
    Case(zero=0),
    Case(zero=0, precision="bf16"),
    Case(zero=0, precision="bf16", optimizer="FusedSGD"),
    Case(zero=1),
    Case(zero=1, precision="bf16", accumulation="fp32"),
    Case(zero=2, precision="bf16"),
    Case(zero=3, precision="bf16", accumulation="fp32"),
]
FP16 = [Case(zero=zero, precision="fp16") for zero in (1, 2, 3)]


def varied(case: Case, **changes: Any) -> Case:
    return Case(**{name: getattr(case, name) for name in case.__slots__} | changes)


CASES = [
    *WRAPPERS,
    *FP16,
    *(varied(case, tied=True, changes=ONE_KEY) for case in WRAPPERS),
    *(varied(case, family="falcon", changes=MULTI_QUERY) for case in WRAPPERS),
    # Only replicated weights are trained: the other ranks count no gradient.
    *(varied(case, trained="norm") for case in WRAPPERS),
    # Frozen weights, in a second layer.
    *(varied(case, trained="layers.1.*(k_proj|norm)") for case in WRAPPERS),
    *(Case(zero=zero, precision="bf16", offload=True) for zero in (1, 2, 3)),
]
WITH_REPLICAS = [
    *(varied(case, accumulate=2) for case in WRAPPERS),
    *(varied(case, family="falcon", changes=MULTI_QUERY) for case in WRAPPERS),
]


def check(found: list[dict[str, Any]], case: Case) -> None:
    exact = 1e-6 if case.precision == "fp32" else 2e-2
    weights = 1e-7 if case.precision == "fp32" else 5e-3
    for rank in found:
        assert rank["norms"] == found[0]["norms"], "the ranks clip by different norms"
        assert rank["norms"] == pytest.approx(rank["gathered"], rel=2e-6)
        assert rank["norms"] == pytest.approx(rank["expected"], rel=exact)
        assert rank["weights"] < weights


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_norm_is_that_of_the_gathered_gradients(pool: Pool, case: Case) -> None:
    check(pool.run(engine_norm_ranks.compare, case, 2), case)


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", WITH_REPLICAS, ids=lambda case: case.name)
def test_the_norm_is_the_same_with_data_parallel_replicas(pool: Pool, case: Case) -> None:
    check(pool.run(engine_norm_ranks.compare, case, 2, ranks=4), case)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "case", [WRAPPERS[1], WRAPPERS[2], WRAPPERS[4], *FP16], ids=lambda c: c.name
)
def test_an_infinite_gradient_of_one_rank_skips_the_step_of_all(pool: Pool, case: Case) -> None:
    found = pool.run(engine_norm_ranks.overflow, case)
    assert found[0] == found[1]
    assert found[0]["skipped"] == [0, 1, 1]
    assert found[0]["moved"] == [True, False, True]


def test_autocast_in_float16_takes_one_decision(pool: Pool) -> None:
    found = pool.run(engine_norm_ranks.overflow, Case(zero=0, precision="autocast"))
    assert found[0] == found[1]
    assert found[0]["moved"] == [True, False, True]
    first, second, third = found[0]["scales"]
    assert first == third * 2 == second * 2


def test_the_norm_of_autocast_in_float16_is_unscaled(pool: Pool) -> None:
    found = pool.run(engine_norm_ranks.compare, Case(zero=0, precision="autocast"), 2)
    for rank in found:
        assert rank["norms"] == found[0]["norms"]
        assert rank["norms"] == pytest.approx(rank["gathered"], rel=1e-5)
        assert rank["norms"] == pytest.approx(rank["expected"], rel=1e-2)


def test_autocast_in_float16_with_zero_is_refused(pool: Pool) -> None:
    text = same_error(pool.run(engine_norm_ranks.refused, Case(zero=1, precision="autocast"), {}))
    assert text.startswith("ValueError: initialize: torch_autocast.dtype: got float16 with ZeRO")


def test_offloaded_norms_of_partly_shared_weights_are_refused(pool: Pool) -> None:
    case = Case(zero=1, family="falcon", changes=MULTI_QUERY, offload=True)
    text = same_error(pool.run(engine_norm_ranks.refused, case, {}))
    assert "offload_optimizer" in text and "query_key_value.weight" in text


def test_fp16_without_zero_is_refused(pool: Pool) -> None:
    text = same_error(pool.run(engine_norm_ranks.refused, Case(zero=0, precision="fp16"), {}))
    assert text.startswith("ValueError: initialize: fp16.enabled: got true with ZeRO stage 0")
    assert "0.19.8" in text and "zero_optimization.stage to 1, 2 or 3" in text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("instance", "initialize: optimizer: got Muon, which forms"),
        ("function", "initialize: optimizer: got Adafactor, which forms"),
        ("Lamb", "initialize: optimizer.type: got Lamb, which forms"),
        ("LBFGS", "initialize: optimizer.type: got LBFGS, which forms"),
    ],
)
def test_an_optimizer_over_tensors_is_refused(pool: Pool, kind: str, words: str) -> None:
    found = pool.run(engine_norm_ranks.refused_optimizer, kind)
    assert same_error([text for text, _ in found]).startswith(f"ValueError: {words}")
    assert all(sharded == (kind == "function") for _, sharded in found)
