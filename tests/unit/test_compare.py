# SPDX-License-Identifier: Apache-2.0
"""Two runs are held against each other module by module, and the right block is blamed."""

import pytest
import torch

from deepspeed_autotp._core import Plan
from deepspeed_autotp.self_check.compare import Comparison
from deepspeed_autotp.self_check.trace import Output, Run
from tests.support.core_llama import llama, preset

DOWN = "model.layers.{}.mlp.down_proj"


def _run(*outputs: tuple[int, int]) -> Run:
    """A run in which the layers with these numbers give so many tensors, one after the other."""
    return Run(
        [
            Output(DOWN.format(at), (torch.ones(2),) * count, (DOWN.format(at),))
            for at, count in outputs
        ]
    )


@pytest.mark.parametrize(
    ("sharded", "words"),
    [
        ([(0, 1), (2, 1)], f"{DOWN.format(2)} runs in the place of {DOWN.format(1)}"),
        ([(0, 1)], f"nothing runs in the place of {DOWN.format(1)}"),
        ([(0, 1), (1, 1), (2, 1)], f"{DOWN.format(2)} runs in the place of nothing"),
        ([(0, 1), (1, 2)], f"the output of {DOWN.format(1)} has 2 tensors instead of 1"),
    ],
)
def test_outputs_of_other_modules_or_of_other_number_differ(
    sharded: list[tuple[int, int]], words: str
) -> None:
    plan = Plan(llama(), preset(), ranks=2)
    whole = _run((0, 1), (1, 1))
    assert Comparison(plan, rank=0, full=whole).first(_run((0, 1), (1, 1))) is None
    found = Comparison(plan, rank=0, full=whole).first(_run(*sharded))
    assert found is not None and words in found.text
    assert found.block == ("model.layers.*.mlp",)
