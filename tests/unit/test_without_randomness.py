# SPDX-License-Identifier: Apache-2.0
"""Without randomness, a training step gives the same numbers whatever the RNG state is."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepspeed_autotp.interop.torch_private import backward
from deepspeed_autotp.self_check.isolation import isolated
from deepspeed_autotp.self_check.trace import Trace
from deepspeed_autotp.self_check.without_randomness import WithoutRandomness

X = torch.linspace(-1, 1, 24).reshape(2, 3, 4)


@pytest.mark.parametrize(
    "drop",
    [
        nn.Dropout(0.5),
        nn.Dropout1d(0.5),
        nn.AlphaDropout(0.5),
        nn.FeatureAlphaDropout(0.5),
        lambda x: F.dropout(x, p=0.9),
        lambda x: F.dropout(input=x, p=0.9),
        lambda x: torch.dropout(x, 0.5, True),
        lambda x: torch.feature_dropout(x, 0.5, True),
    ],
)
def test_dropout_is_the_identity_and_is_seen(drop: Callable[[Tensor], Tensor]) -> None:
    seen: list[tuple[int, ...]] = []
    with WithoutRandomness(lambda x: seen.append(tuple(x.shape))):
        assert torch.equal(drop(X), X)
    assert seen == [(2, 3, 4)]


@pytest.mark.parametrize(
    "drop",
    [nn.Dropout(0.0), nn.Dropout(0.5).eval(), lambda x: torch.dropout(x, p=0.5, train=False)],
)
def test_dropout_that_drops_nothing_is_not_seen(drop: Callable[[Tensor], Tensor]) -> None:
    seen: list[Tensor] = []
    with WithoutRandomness(seen.append):
        assert torch.equal(drop(X), X)
    assert seen == []


@pytest.mark.parametrize("by_position", [True, False])
def test_attention_drops_nothing(by_position: bool) -> None:
    expected = F.scaled_dot_product_attention(X, X, X)
    with WithoutRandomness(lambda x: None):
        got = (
            F.scaled_dot_product_attention(X, X, X, None, 0.5)
            if by_position
            else F.scaled_dot_product_attention(X, X, X, dropout_p=0.5)
        )
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("draw", "value"),
    [
        (lambda: torch.rand(3), 0.5),
        (lambda: torch.rand([3]), 0.5),
        (lambda: torch.rand_like(X), 0.5),
        (lambda: torch.randn(2, 3), 0.0),
        (lambda: torch.randn_like(X), 0.0),
        (lambda: torch.empty(3).uniform_(), 0.5),
        (lambda: torch.empty(3).uniform_(0.9, 1.1), 1.0),
        (lambda: torch.empty(3).uniform_(to=2.0), 1.0),
        (lambda: torch.empty(3).normal_(), 0.0),
        (lambda: torch.empty(3).normal_(mean=2.0, std=3.0), 2.0),
        (lambda: torch.empty(3).bernoulli_(0.9), 1.0),
        (lambda: torch.empty(3).bernoulli_(torch.tensor(0.1)), 0.0),
        (lambda: torch.bernoulli(torch.full((3,), 0.9)), 1.0),
        (lambda: torch.full((3,), 0.2).bernoulli(), 0.0),
        (lambda: torch.empty(3).exponential_(2.0), 0.34657),
    ],
)
def test_a_draw_has_the_value_in_the_middle(draw: Callable[[], Tensor], value: float) -> None:
    with WithoutRandomness(lambda x: None):
        got = draw()
    assert torch.allclose(got, torch.full_like(got, value), atol=1e-4)


class Kept(nn.Module):
    """Keeps probabilities for kernels of its own, and drops them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_dropout = 0.5
        self.layerdrop = 0.5
        self.rnn = nn.LSTM(4, 4, num_layers=2, dropout=0.5)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        y, _ = self.rnn(x)
        z, _ = self.attention(y, y, y)
        return z, self.attention_dropout + self.layerdrop


def test_probabilities_that_modules_keep_are_zero_for_a_while() -> None:
    torch.manual_seed(0)
    model = Kept()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with isolated(model, torch.device("cpu")), WithoutRandomness(lambda x: None):
            assert all(module.training for module in model.modules())
            results.append(model(X))
    assert torch.equal(results[0][0], results[1][0])
    assert all(0 < kept < 1e-20 for _, kept in results)
    assert (model.attention_dropout, model.layerdrop, model.rnn.dropout) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("way", ["gradients", "objective"])
def test_a_model_without_a_loss_has_gradients(way: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    trace = Trace(dict(model.named_modules()), exits=())
    parameters = dict(enumerate(model.parameters()))
    with WithoutRandomness(trace.drawn), trace:
        if way == "gradients":
            trace.differentiate(model(X), parameters, labelled=False)
            gradients = list(trace.run.gradients.values())
        else:
            trace.objective(model(X), labelled=False).backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 2
    assert all(float(gradient.norm()) > 0.1 for gradient in gradients)


class Recomputed(nn.Module):
    """Computes its layers again in the backward pass, without re-entry."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.layers, x, use_reentrant=False)
        return y


@pytest.mark.parametrize("way", ["gradients", "objective"])
def test_what_is_recomputed_in_the_backward_is_not_random(way: str) -> None:
    model = Recomputed()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        trace = Trace(dict(model.named_modules()), exits=())
        with WithoutRandomness(trace.drawn), trace:
            if way == "gradients":
                parameters = dict(enumerate(model.parameters()))
                trace.differentiate(model(X), parameters, labelled=False)
                found.append(list(trace.run.gradients.values()))
            else:
                backward(trace.objective(model(X), labelled=False))
                found.append([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert len(found[0]) == 4
    assert all(map(torch.equal, *found))
