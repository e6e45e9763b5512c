# SPDX-License-Identifier: Apache-2.0
"""Optimizers of unknown names are tried on parts of a tensor, and stay as they were."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from deepspeed_autotp.interop.optimizer_parts import refuse_unlike_on_parts


class Mine(torch.optim.AdamW):
    """Works element by element."""


class Noisy(torch.optim.SGD):
    """Draws random numbers."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(torch.randn_like(p) * 1e-2)


class Clipping(torch.optim.SGD):
    """Clips by the norm of all that it has."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 0.1)
        super().step()


class ByRow(torch.optim.SGD):
    """A number for each row, which a shard of columns has a part of."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.ndim == 2:
                    p.grad.div_(p.grad.norm(dim=1, keepdim=True))
        super().step()


class Late(torch.optim.SGD):
    """Needs what is set after it was built."""

    def step(self, closure: Any = None) -> None:
        raise RuntimeError("call begin() first")


class Freeing(torch.optim.SGD):
    """Has something outside of Python."""

    def __del__(self) -> None:
        self.param_groups.clear()


class Holding(torch.optim.SGD):
    """Steps what it has remembered."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.remembered = list(self.param_groups[0]["params"])

    def step(self, closure: Any = None) -> None:
        for p in self.remembered:
            p.data.zero_()


def made(cls: Any, **more: Any) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))]
    optimizer: torch.optim.Optimizer = cls(parameters, **more)
    return optimizer


def test_one_that_works_element_by_element_is_accepted_and_unchanged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    optimizer = made(Mine, lr=0.0, weight_decay=0.1)
    steps: list[Any] = []
    optimizer.register_step_pre_hook(lambda *given: steps.append(given))
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    drawn = torch.random.get_rng_state()
    refuse_unlike_on_parts(optimizer, before="here")
    assert torch.equal(drawn, torch.random.get_rng_state())
    after = optimizer.param_groups[0]["params"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (steps, dict(optimizer.state), caplog.records) == ([], {}, [])


@pytest.mark.parametrize("cls", [Noisy, Clipping, ByRow])
@pytest.mark.parametrize("lr", [0.0, 1e-3])  # as a warm-up has it at first
def test_others_are_refused(cls: Any, lr: float) -> None:
    with pytest.raises(ValueError, match=f"^here: got {cls.__name__}, which updates a shard"):
        refuse_unlike_on_parts(made(cls, lr=lr), before="here")


def test_every_kind_of_group_is_tried() -> None:
    class Some(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"] if group["by_tensor"] else ():
                    p.grad.div_(p.grad.norm())
            super().step()

    optimizer = made(Some, lr=0.1)
    optimizer.param_groups[0]["by_tensor"] = False
    refuse_unlike_on_parts(optimizer, before="here")
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "by_tensor": True})
    with pytest.raises(ValueError, match="got Some"):
        refuse_unlike_on_parts(optimizer, before="here")


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Late, "RuntimeError: call begin() first"),
        (Freeing, "it frees something when it is deleted"),
        (Holding, "its attribute remembered is not made of numbers and texts alone"),
    ],
)
def test_one_that_cannot_be_tried_is_warned_of(
    cls: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = made(cls)
    with caplog.at_level(logging.WARNING, "deepspeed_autotp"):
        refuse_unlike_on_parts(optimizer, before="here")
    assert [r.getMessage() for r in caplog.records if reason in r.getMessage()]
    assert all(bool(p.any()) for p in optimizer.param_groups[0]["params"])
