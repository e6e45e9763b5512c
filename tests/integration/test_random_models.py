# SPDX-License-Identifier: Apache-2.0
"""Random models train sharded as in one process; ``make prove`` has more of them."""

import math
from dataclasses import fields

import pytest
import torch

from tests.integration.random_models_ranks import dtypes_of_linears, run_wrongly
from tests.support.prove.case import Case
from tests.support.prove.compare import MARGIN, Difference, allowed, differences, widened
from tests.support.prove.drawing import draw, parse
from tests.support.prove.refusals import refusals
from tests.support.prove.search import Verdict, shrunk, verdict
from tests.support.prove.training import Curve
from tests.support.worker_pool import Pool

# The first seeds of eight each, and how many of eight are compared rather than refused.
SEEDS = (0, 8)
LEAST = 4
# What failed once, made as plain as its fault allows.
FOUND = (
    "way='zero 3' skipped='block' layers=2 seed=50201",
    "way='zero 3' accumulate=2 forwards_first=True",
    "way='zero 2' offload=True skipped='block' layers=2 accumulate=2",
    "way='zero 2' skipped='head' outputs='two heads'",
    "functional=True layers=2 shared='block'",
    "functional=True projection='tensors'",
)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_models_train_as_in_one_process_or_are_refused(pool: Pool, seed: int) -> None:
    kinds = []
    for case in map(draw, range(seed, seed + 8)):
        found = verdict(pool, case)
        assert not found.is_failure, f'{found.kind}: {found.text}\nmake prove CASE="{case}"'
        kinds.append(found.kind)
    assert kinds.count("same") >= LEAST, kinds


@pytest.mark.parametrize("text", FOUND)
def test_what_has_failed_once_trains_as_in_one_process(pool: Pool, text: str) -> None:
    found = verdict(pool, parse(text))
    assert found.kind == "same", f"{found.kind}: {found.text}"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gradient", "gradient lm_head.bias of step 2: 2.0e-06 > 1e-09"),
        ("loss", "loss of step 2: 2.0e-06 > 1e-09"),
        ("norm", "norm of step 2: 2.0e-06 > 1e-09"),
        ("weight", "weight lm_head.bias: "),
        ("replica", "norm.weight"),
    ],
)
def test_an_error_of_two_millionths_on_one_rank_is_found(pool: Pool, kind: str, said: str) -> None:
    _, wrong = pool.run(run_wrongly, parse("projection='qkv' head_bias=True"), kind)
    assert wrong.kind == "differs"
    assert said in wrong.text


def test_half_a_gradient_on_one_rank_is_found_with_autocast(pool: Pool) -> None:
    case = parse("autocast=True projection='qkv' head_bias=True")
    _, wrong = pool.run(run_wrongly, case, "half gradient")
    assert wrong.kind == "differs"
    assert "gradient lm_head.bias of step 0" in wrong.text


def test_linear_layers_of_a_case_with_autocast_compute_in_bfloat16(pool: Pool) -> None:
    for dtypes in pool.run(dtypes_of_linears, parse("autocast=True")):
        assert dtypes == {torch.bfloat16}


def test_a_norm_that_is_no_number_differs_and_none_is_not_compared() -> None:
    (found,) = differences(
        Curve(norms=[math.nan, None]), Curve(norms=[1.0, 1.0], evaluated=math.inf)
    )
    assert (str(found), found.far) == ("norm of step 0", math.inf)


def test_noise_of_one_parameter_widens_the_bound_of_no_other() -> None:
    noise = {("gradient", "a", ""): 0.5, ("gradient", "b", ""): 1e-6, ("gradient", "c", ""): 0.0}
    wide, *others = widened(noise).values()
    assert wide == MARGIN * 0.5
    assert others == [MARGIN * 1e-6, MARGIN * 1e-6]


def test_a_number_that_overflows_in_one_process_widens_no_bound_of_others() -> None:
    bounds = {("loss", "", ""): 0.1, ("loss", "", "of step 1"): math.inf}
    assert allowed(bounds, Difference("loss", "", "of step 0", 0.0)) == 0.1
    assert allowed(bounds, Difference("loss", "", "of step 1", 0.0)) == math.inf


def test_a_value_error_of_a_model_is_no_refusal() -> None:
    with pytest.raises(ValueError, match="of the model"), refusals():
        raise ValueError("of the model")


def test_a_case_follows_from_its_seed_and_from_what_is_printed() -> None:
    for seed in range(200):
        assert draw(seed) == draw(seed) == parse(str(draw(seed)))
    assert parse("") == Case()


def test_no_value_of_a_field_is_ruled_out_by_all_others() -> None:
    values = [
        (f.name, value) for f in fields(Case) for value in f.metadata["values"] if f.name != "seed"
    ]
    missing = [
        f"{name}={value!r}"
        for name, value in values
        if not any(getattr(draw(s, **{name: value}), name) == value for s in range(400))
    ]
    assert missing == []


def test_a_case_that_fails_is_made_as_plain_as_its_fault_allows() -> None:
    def judge(case: Case) -> Verdict:
        fails = case.tied and case.tp == 3 and case.layers > 1
        return Verdict("differs" if fails else "same", "")

    case = next(c for c in map(draw, range(10_000)) if judge(c).is_failure and c.layers == 3)
    small, found = shrunk(judge, case, judge(case))
    assert found.is_failure
    assert str(small) == f"tp=3 layers=2 tied='weight' seed={case.seed}"
