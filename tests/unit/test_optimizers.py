# SPDX-License-Identifier: Apache-2.0
"""Optimizers that form a number over a tensor are known by name; others are left alone."""

from typing import Any

import pytest
import torch

from deepspeed_autotp.interop.optimizers import refuse_optimizer_over_tensors

OVER_TENSORS = (torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Muon)


def optimizers() -> list[type[torch.optim.Optimizer]]:
    found = [c for c in vars(torch.optim).values() if isinstance(c, type)]
    return [
        c for c in found if issubclass(c, torch.optim.Optimizer) and c is not torch.optim.Optimizer
    ]


def made(cls: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = cls([torch.nn.Parameter(torch.ones(2, 2))])
    return optimizer


def refusal(optimizer: Any) -> str:
    with pytest.raises(ValueError, match="initialize: optimizer") as caught:
        refuse_optimizer_over_tensors(optimizer, before="initialize: optimizer")
    return str(caught.value)


def test_torchs_optimizers_that_work_element_by_element_are_accepted() -> None:
    accepted = [c for c in optimizers() if c not in OVER_TENSORS]
    assert {torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop} <= set(accepted)
    for cls in accepted:
        refuse_optimizer_over_tensors(made(cls), before="initialize: optimizer")


@pytest.mark.parametrize("cls", OVER_TENSORS)
def test_torchs_others_are_refused(cls: type[torch.optim.Optimizer]) -> None:
    assert f"got {cls.__name__}, which forms" in refusal(made(cls))


def test_a_subclass_and_a_wrapper_are_refused_by_what_is_inside() -> None:
    class Mine(torch.optim.Muon):
        pass

    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    assert "got Muon, which forms" in refusal(made(Mine))
    assert "got Muon, which forms" in refusal(Wrapper(made(Mine)))


@pytest.mark.parametrize("name", ["Lamb", "muon", "OneBitAdam", "Adam_mini", "Prodigy", "SOAP"])
def test_names_are_found_in_any_spelling(name: str) -> None:
    assert f"got {name}, which forms" in refusal(name)


@pytest.mark.parametrize("name", ["AdamW", "adam", "Lion", "sgd", "AdamW8bit", "", None])
def test_other_names_are_accepted(name: str | None) -> None:
    refuse_optimizer_over_tensors(name, before="initialize: optimizer.type")
