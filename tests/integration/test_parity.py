# SPDX-License-Identifier: Apache-2.0
"""Training over ranks gives the losses of one process."""

from collections.abc import Iterator
from itertools import product

import pytest

from tests.support.engine_config import Setting
from tests.support.loss_curves import train_family
from tests.support.small_models import FAMILIES
from tests.support.worker_pool import Pool


def cases() -> Iterator[object]:
    """One of each family in two of four ways is enough for each run; `make long` has the others."""
    for family, tied, tp in product(FAMILIES, (False, True), (4, 2)):
        marks = [] if family == "llama" or tied == (tp == 4) else [pytest.mark.long]
        name = f"{'tp4' if tp == 4 else 'tp2xdp2'}-{'tied' if tied else 'untied'}-{family}"
        yield pytest.param(family, tied, tp, 4, id=name, marks=marks)


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "tied", "tp", "ranks"), list(cases()))
def test_losses_equal_one_process(pool: Pool, family: str, tied: bool, tp: int, ranks: int) -> None:
    settings = [
        Setting(tp=tp, zero=zero, clip=clip, self_check="auto" if zero % 2 == clip else False)
        for zero, clip in product((0, 1, 2, 3), (0.0, 1.0))
        if (zero + int(clip) + tied) % 2 == 0  # each with one of the two, tied or not
    ]
    for worst in pool.run(train_family, family, tied, settings, ranks=ranks, timeout=60):
        assert {s: d for s, d in worst.items() if d > 1e-5} == {}


def test_gradient_accumulation_equals_one_process(pool: Pool) -> None:
    settings = [Setting(tp=2, zero=zero, clip=1.0, accumulate=2) for zero in (0, 1, 2)]
    for worst in pool.run(train_family, "llama", False, settings, ranks=4):
        assert {s: d for s, d in worst.items() if d > 1e-5} == {}


def test_sixteen_bit_training_stays_near_one_process(pool: Pool) -> None:
    settings = [Setting(tp=2, zero=zero, clip=1.0, precision="bf16") for zero in (1, 2, 3)]
    for worst in pool.run(train_family, "qwen3", True, settings, ranks=4):
        assert {s: d for s, d in worst.items() if d > 2e-2} == {}
