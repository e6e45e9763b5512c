# SPDX-License-Identifier: Apache-2.0
"""Random models train sharded as in one process; ``make prove`` has more of them."""

from dataclasses import fields

import pytest
import torch

from tests.integration.random_models_ranks import dtypes_of_linears, run_wrongly
from tests.support.prove.case import Case
from tests.support.prove.drawing import draw, parse
from tests.support.prove.search import Verdict, shrunk, verdict
from tests.support.worker_pool import Pool

SEEDS = range(16)
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
def test_a_random_model_trains_as_in_one_process_or_is_refused(pool: Pool, seed: int) -> None:
    case = draw(seed)
    found = verdict(pool, case)
    assert not found.is_failure, f'{found.kind}: {found.text}\nmake prove CASE="{case}"'


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


def test_linear_layers_of_a_case_with_autocast_compute_in_bfloat16(pool: Pool) -> None:
    for dtypes in pool.run(dtypes_of_linears, parse("autocast=True")):
        assert dtypes == {torch.bfloat16}


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
