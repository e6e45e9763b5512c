# SPDX-License-Identifier: Apache-2.0
"""A case whose sharded run is wrong in one number on one rank, and what a run computes in."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.prove import sharded
from tests.support.prove.case import Case
from tests.support.prove.compare import Outcome, dtype_of, run_case
from tests.support.prove.sharded import Sharded
from tests.support.prove.training import Curve

# Of a gradient: a thousandth of what the self-check allows in float32.
ERROR = 2e-6


def run_wrongly(case: Case) -> Outcome:
    """On rank 1 the last gradient of all is a little larger."""
    right = sharded.make_optimizer

    def make_optimizer(of: Case, model: nn.Module) -> torch.optim.Optimizer:
        if dist.get_rank() == 1:
            *_, last = (p for p in model.parameters() if p.requires_grad)
            last.register_hook(lambda gradient: gradient * (1 + ERROR))
        return right(of, model)

    with mock.patch.object(sharded, "make_optimizer", make_optimizer):
        return run_case(case, "")


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
