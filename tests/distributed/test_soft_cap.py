# SPDX-License-Identifier: Apache-2.0
"""A soft cap is part of the loss, and is computed for whoever reads the logits."""

import pytest
import torch

from deepspeed_autotp.vocab_parallel.soft_cap import Derivative, Step, Steps, cap_of, follows
from tests.distributed import soft_cap_ranks
from tests.support.worker_pool import Pool

DIV, TANH, MUL = Step(torch.div, 5.0), Step(torch.tanh), Step(torch.mul, 5.0)
LATE = "these logits are used for the first time after the"


@pytest.mark.parametrize(
    ("steps", "after"),
    [((), {DIV}), ((DIV,), {TANH}), ((DIV, TANH), {MUL}), ((DIV, TANH, MUL), set())],
)
def test_each_step_alone_is_followed_by_every_other(steps: Steps, after: set[Step]) -> None:
    numbers = (5.0, 2.0, 0.0, -5.0, float("inf"), float("nan"))
    every = {TANH, *(Step(op, c) for op in (torch.div, torch.mul) for c in numbers)}
    more = {Step(torch.div, 2.0)} if not steps else set()
    assert {step for step in every if follows(step, steps)} == {*after, *more}
    assert cap_of(steps) == (5.0 if len(steps) == 3 else 0.0)


@pytest.mark.parametrize("steps", [(DIV,), (DIV, TANH), (DIV, TANH, MUL)])
def test_steps_have_the_bits_of_autograd(steps: Steps) -> None:
    x = torch.linspace(-20, 20, 101, requires_grad=True)
    dy = torch.linspace(1, 2, 101)
    expected = x
    for step in steps:
        expected = step.operation(expected, *([step.number] if step.number else []))
    expected.backward(dy)
    assert x.grad is not None
    before, derivative = dy.clone(), Derivative(steps)
    assert torch.equal(derivative.values(x.detach()), expected.detach())
    assert torch.equal(derivative.gradient(dy, again=True), x.grad)
    assert torch.equal(derivative.gradient(dy, again=False), x.grad)
    assert torch.equal(dy, before)
    assert torch.equal(x.detach(), torch.linspace(-20, 20, 101))


def test_a_second_gradient_that_was_not_announced_is_an_error() -> None:
    derivative = Derivative((DIV, TANH))
    dy = derivative.values(torch.ones(3))
    derivative.gradient(dy, again=False)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        derivative.gradient(dy, again=False)


@pytest.mark.parametrize(("name", "limit"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_capped_logits_have_the_loss_and_gradients_of_one_process(
    pool: Pool, name: str, limit: float, ranks: int
) -> None:
    for found in pool.run(soft_cap_ranks.compare, name, ranks=ranks):
        assert {use: x for use, x in found.items() if max(x[:2]) > limit or not x[2]} == {}


def test_whoever_reads_them_has_the_bits_of_the_operations(pool: Pool) -> None:
    for found in pool.run(soft_cap_ranks.bits):
        assert [name for name, right in found.items() if not right] == []


def test_sixteen_bit_logits_are_capped_in_float32(pool: Pool) -> None:
    expected = (True, "torch.float32", True)
    for found in pool.run(soft_cap_ranks.sixteen_bit):
        assert found == {"cast after": expected, "cast first": expected}


def test_what_is_there_after_the_backward_is_right_or_an_error(pool: Pool) -> None:
    for found in pool.run(soft_cap_ranks.afterwards):
        assert found == {
            "only": LATE,
            "seen": "right",
            "below": "right",
            "quotient": "right",
            "raw": LATE,
            "copy": "right",
            "twice": "right",
        }


def test_a_view_that_is_out_of_date_is_an_error(pool: Pool) -> None:
    for found in pool.run(soft_cap_ranks.another_view):
        assert all("modified in place through another view" in said for said in found), found


def test_a_gradient_that_the_loss_does_not_form_is_an_error(pool: Pool) -> None:
    for found in pool.run(soft_cap_ranks.too_late_to_watch):
        assert all("since the loss applies their soft cap itself" in said for said in found), found


def test_a_cap_in_the_loss_takes_a_fraction_of_the_memory(pool: Pool) -> None:
    for most in pool.run(soft_cap_ranks.peak, 30.0, 30.0):
        assert most < 1.3
    for most in pool.run(soft_cap_ranks.peak, 30.0, 15.0):
        assert most > 2.0


def test_a_quotient_takes_no_more_memory_than_itself(pool: Pool) -> None:
    for most, between in pool.run(soft_cap_ranks.divided_peak):
        assert most < 2.1 and between < 1.1


def test_a_capped_loss_gathers_what_any_loss_gathers(pool: Pool) -> None:
    assert pool.run(soft_cap_ranks.gathers) == [[("all-gather", 3 * 10 * 8)]] * 2
