# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the cross-entropy kernels, and the torch operations that stand in for them,
give what float64 gives."""

import math
from typing import Any

import pytest
import torch

from deepspeed_autotp.native import operators
from deepspeed_autotp.vocab_parallel import cross_entropy_kernels
from tests.support.cross_entropy_kernels import ROUNDING, TYPES, EmulatedKernels, batch, exact
from tests.support.emulated_cuda import Library, build


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels:
    return EmulatedKernels(Library(build(tmp_path_factory.mktemp("vocab"))))


@pytest.fixture(params=["kernels", "torch"])
def made(request: pytest.FixtureRequest, emulated: EmulatedKernels) -> Any:
    return emulated if request.param == "kernels" else cross_entropy_kernels


@pytest.mark.parametrize("cap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_both_passes_give_what_float64_gives(made: Any, dtype: torch.dtype, cap: float) -> None:
    # One element, less than a word, words with and without ends, more than a round of a block.
    for width, offset in ((1, 0), (7, 1), (8, 0), (513, 3), (4099, 0), (20000, 5)):
        logits, columns = batch(width, dtype, offset=offset)
        total, label, gradient = exact(logits, columns, cap)
        found = made.statistics(logits, columns, cap=cap)
        rows = total.isfinite()
        sums = found[0].double() + found[1].double().log()
        assert (sums - total)[rows].abs().max() <= 1e-6 * total[rows].abs().max()
        assert found[1][~rows].eq(0).all() and found[0][~rows].eq(-math.inf).all()
        assert (found[2] - label)[rows].abs().max() <= 1e-6 * label[rows].abs().max().clamp(min=1)
        scale = torch.where(rows, 0.5, 0.0)
        made.differentiate_(logits, total.float(), columns, scale, cap=cap)
        error = (logits.double() - 0.5 * gradient)[rows].abs().max()
        assert error <= ROUNDING[dtype] * gradient[rows].abs().max().clamp(min=1e-3)
        assert logits[~rows].eq(0).all()


def test_what_is_no_number_stays_none_and_is_hidden_by_a_scale_of_zero(made: Any) -> None:
    logits = torch.zeros(3, 1000)
    logits[0, 700], logits[1] = math.nan, math.nan
    logits[2, 5] = math.inf
    columns = torch.tensor([1, 2, 3])
    found = made.statistics(logits, columns)
    assert (found[0] + found[1].log()).isnan().all()
    made.differentiate_(logits, torch.zeros(3), columns, torch.tensor([1.0, 0.0, 0.0]))
    assert logits[0, 700].isnan() and logits[1:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_read_and_rounded_as_torch_does(
    emulated: EmulatedKernels, dtype: torch.dtype
) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    read, kind = torch.empty(len(finite)), TYPES[dtype]
    emulated.library.read(finite.data_ptr(), read.data_ptr(), len(finite), kind)
    assert torch.equal(read, finite.float())
    # Every value, and what lies halfway to the next, which goes to the even one.
    ordered = read.sort().values
    exact_ones = torch.cat([ordered, (ordered[1:] + ordered[:-1]) / 2, ordered[-1:] * 2])
    rounded = torch.empty(len(exact_ones), dtype=dtype)
    emulated.library.round(exact_ones.data_ptr(), rounded.data_ptr(), len(exact_ones), kind)
    assert torch.equal(rounded, exact_ones.to(dtype))


@pytest.mark.usefixtures("compile_cache")
def test_opcheck_accepts_the_operators() -> None:
    named = operators.loaded()
    logits, columns = torch.randn(4, 9), torch.tensor([0, 8, -1, 9])
    for cap in (0.0, 5.0):
        torch.library.opcheck(named.vocab_statistics.default, (logits, columns, cap))
        torch.library.opcheck(
            named.vocab_gradient_.default,
            (logits.clone(), torch.ones(4), columns, torch.ones(4), cap),
        )
