# SPDX-License-Identifier: Apache-2.0
"""Cases whose sharded run is wrong in one number on one rank, and what a run computes in."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.prove.case import Case
from tests.support.prove.compare import Outcome, dtype_of, run_case
from tests.support.prove.sharded import STEPS, Sharded
from tests.support.prove.training import Curve

# Of a gradient: a thousandth of what the self-check allows in float32.
ERROR = 2e-6
FACTORS = {"gradient": 1 + ERROR, "half gradient": 0.5}
# Between replicas it is an error however small it is.
SMALL_ERROR = 1e-12


def run_wrongly(case: Case, kind: str) -> Outcome:
    """On rank 1 a number of this kind is a little larger."""
    right: Any = Sharded.train

    def train(run: Sharded, curve: Curve, first: int = 0, last: int = STEPS) -> None:
        is_wrong = dist.get_rank() == 1
        if is_wrong and kind in FACTORS:
            *_, head = run.model.parameters()
            head.register_hook(lambda gradient: gradient * FACTORS[kind])
        right(run, curve, first, last)
        if is_wrong:
            disturb(run, curve, kind)

    with mock.patch.object(Sharded, "train", train):
        return run_case(case, "")


def disturb(run: Sharded, curve: Curve, kind: str) -> None:
    """A number of what three steps gave."""
    if kind in ("loss", "norm"):
        numbers: list[Any] = curve.losses if kind == "loss" else curve.norms
        numbers[-1] *= 1 + ERROR
    elif kind == "weight":
        *_, head = run.model.parameters()  # the last is sharded
        head.data.mul_(1 + ERROR)
    elif kind == "replica":
        run.model.get_parameter("norm.weight").data.mul_(1 + SMALL_ERROR)


def dtypes_of_linears(case: Case) -> set[torch.dtype]:
    """What the linear layers of a sharded run give."""
    found = set()

    def see(module: nn.Module, args: Any, output: Tensor) -> None:
        found.add(output.dtype)

    run = Sharded(case, dtype_of(case), "")
    for module in run.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(see)
    run.train(Curve(), last=1)
    return found
