# SPDX-License-Identifier: Apache-2.0
"""What follows attention in a block: plain and gated networks, and experts."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.prove.case import Case
from tests.support.prove.linear import called
from tests.support.prove.names import NETWORK_NAMES
from tests.support.prove.norms import RMS, Dropout

EXPERTS = 4


class OwnSilu(torch.autograd.Function):
    """A function that a user has written the gradient of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        share = x.sigmoid()
        return gradient * share * (1 + x * (1 - share))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "squared": lambda x: F.relu(x).square(),
    "in place": lambda x: F.silu(x, inplace=True),
    "own backward": lambda x: OwnSilu.apply(x),  # type: ignore[no-untyped-call]
    "vmap": lambda x: torch.vmap(torch.tanh)(x),
}


class Network(nn.Module):
    """Plain or gated, in one or two projections."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.kind = case, case.network
        self.names = NETWORK_NAMES[case.network_names]
        self.activation = ACTIVATIONS[case.activation]
        gate, up, down, fused = self.names
        hidden, inner, bias = case.hidden, case.inner, case.network_bias
        if self.kind in ("plain", "gated", "two inputs"):
            self.add_module(up, nn.Linear(hidden, inner, bias=bias))
            if self.kind == "gated":
                self.add_module(gate, nn.Linear(hidden, inner, bias=bias))
        else:
            self.add_module(fused, nn.Linear(hidden, 2 * inner, bias=bias))
        self.norm, self.per_feature = make_inner_norm(case), make_per_feature(case)
        self.add_module(down, nn.Linear(inner, hidden, bias=bias))
        self.drop = Dropout(-1, inner) if case.dropout else None
        self.penalty: Tensor | None = None
        if case.counts == "running mean":
            self.register_buffer("mean", torch.zeros(inner))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down, fused = self.names
        if self.kind == "plain":
            y = self.activation(self.apply_layer(up, x))
        elif self.kind == "gated":
            y = self.activation(self.apply_layer(gate, x)) * self.apply_layer(up, x)
        elif self.kind == "two inputs":
            y = self.activation(self.apply_layer(up, x)) * self.apply_layer(up, x.roll(1, -2))
        else:
            y = self.gated(self.apply_layer(fused, x))
        y = self.looked_at(self.per_feature(self.norm(y)))
        y = y if self.drop is None else self.drop(y)
        return self.apply_layer(down, y)

    def apply_layer(self, name: str, x: Tensor) -> Tensor:
        return called(self.case, self.get_submodule(name), x)

    def looked_at(self, y: Tensor) -> Tensor:
        """With a term of the loss, or less a mean that is kept."""
        if self.case.penalty == "inner":
            self.penalty = y.square().sum() / (1 + y.numel())
        if self.case.counts == "running mean":
            if self.training and y.numel():
                with torch.no_grad():
                    self.mean.mul_(0.9).add_(0.1 * y.flatten(0, -2).mean(0))
            y = y - self.mean
        return y

    def gated(self, mixed: Tensor) -> Tensor:
        if self.kind == "per feature":
            return self.activation(mixed[..., ::2]) * mixed[..., 1::2]
        first, second = mixed.chunk(2, dim=-1)
        gate, up = (first, second) if self.kind == "gate|up" else (second, first)
        return self.activation(gate) * up


class OverFeatures(nn.Module):
    """A function that needs all features at once, and has no parameters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "softmax":
            return x.softmax(-1)
        if self.kind == "unit":
            return F.normalize(x, dim=-1)
        return x / (1 + x.detach().abs().amax(-1, keepdim=True))


class PerFeature(nn.Module):
    """A weight or a bias for each feature, or a function of each feature over the tokens."""

    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "convolution":
            self.conv = nn.Conv1d(size, size, 3, padding=2, groups=size)
        else:
            self.weight = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "scale":
            return x * self.weight
        if self.kind == "bias":
            return x + self.weight
        if self.kind == "convolution":
            y: Tensor = self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
            return y
        state, states = torch.zeros_like(x[:, 0]), []
        for step in x.unbind(1):
            state = state * self.weight.sigmoid() + step
            states.append(state)
        return torch.stack(states, 1)


def make_inner_norm(case: Case) -> nn.Module:
    norms = {"layer": nn.LayerNorm, "rms": RMS}
    if case.inner_norm in norms:
        return norms[case.inner_norm](case.inner)
    return OverFeatures(case.inner_norm) if case.inner_norm else nn.Identity()


def make_per_feature(case: Case) -> nn.Module:
    return PerFeature(case.per_feature, case.inner) if case.per_feature else nn.Identity()


class Conv1DNetwork(nn.Module):
    """GPT-2's linear layers, whose weights are transposed."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        _, up, down, _ = self.names = NETWORK_NAMES[case.network_names]
        self.activation = ACTIVATIONS[case.activation]
        self.add_module(up, Conv1D(case.inner, case.hidden))
        self.add_module(down, Conv1D(case.hidden, case.inner))

    def forward(self, x: Tensor) -> Tensor:
        _, up, down, _ = self.names
        y: Tensor = self.get_submodule(down)(self.activation(self.get_submodule(up)(x)))
        return y


class Activation(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.function = ACTIVATIONS[case.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class TensorExperts(nn.Module):
    """Experts whose weights are one tensor each: ``[experts, in, out]`` or transposed."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.transposed, self.gated = case.experts == "transposed", case.network != "plain"
        self.activation = ACTIVATIONS[case.activation]
        hidden, inner = case.hidden, case.inner
        wide = 2 * inner if self.gated else inner
        shapes = (EXPERTS, hidden, wide), (EXPERTS, inner, hidden)
        up, down = (torch.randn(each) / each[1] ** 0.5 for each in shapes)
        if self.transposed:
            up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        self.gate_up_proj, self.down_proj = nn.Parameter(up), nn.Parameter(down)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Tokens ``[T, hidden]``, weights ``[T, experts]``, mostly zero."""
        up, down = self.gate_up_proj, self.down_proj
        if self.transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        y = torch.einsum("th,ehi->eti", x, up)
        if self.gated:
            gate, y = y.chunk(2, dim=-1)
            y = self.activation(gate) * y
        else:
            y = self.activation(y)
        y = torch.einsum("eti,eih->eth", y, down)
        return (y * weights.t()[..., None]).sum(0)


class Mixture(nn.Module):
    """A router, experts, and perhaps one that all tokens visit."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.router = nn.Linear(case.hidden, EXPERTS, bias=case.router == "bias")
        if case.experts == "list":
            self.experts: nn.Module = nn.ModuleList([plain_network(case) for _ in range(EXPERTS)])
        else:
            self.experts = TensorExperts(case)
        if case.shared_expert:
            self.shared_expert = plain_network(case)
        self.penalty: Tensor | None = None
        if case.counts == "router bias":
            self.register_buffer("load_bias", torch.zeros(EXPERTS))
        if case.shared_expert == "gated":
            self.shared_expert_gate = nn.Linear(case.hidden, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.route(tokens)
        if isinstance(self.experts, nn.ModuleList):
            y = torch.zeros_like(tokens)
            for index, expert in enumerate(self.experts):
                token, place = torch.where(chosen == index)
                given = expert(tokens[token]) * weights[token, place, None]
                y = y.index_add(0, token, given.to(y.dtype))
        else:
            spread = torch.zeros(len(tokens), EXPERTS, dtype=weights.dtype)
            y = self.experts(tokens, spread.scatter(1, chosen, weights))
        if self.case.shared_expert:
            more = self.shared_expert(tokens)
            gate = self.case.shared_expert == "gated"
            y = y + (more * self.shared_expert_gate(tokens).sigmoid() if gate else more)
        return y.view_as(x)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(tokens)
        kept = 1 if self.case.router == "top 1" else 2
        shares = scores.sigmoid() if self.case.router == "sigmoid" else scores.softmax(-1)
        if self.case.counts == "router bias":
            chosen = (shares + self.load_bias).topk(kept, dim=-1).indices
            weights = shares.gather(-1, chosen)
            self.count(chosen)
        else:
            weights, chosen = shares.topk(kept, dim=-1)
        if self.case.penalty == "router":
            self.penalty = EXPERTS * shares.mean(0).square().sum()
        if self.case.router == "sigmoid":
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen

    @torch.no_grad()
    def count(self, chosen: Tensor) -> None:
        """Make experts that had few tokens likelier, as DeepSeek-V3 does."""
        if self.training:
            load = F.one_hot(chosen, EXPERTS).sum((0, 1)).to(self.load_bias.dtype)
            self.load_bias += 0.01 * (load.mean() - load)


def plain_network(case: Case) -> nn.Module:
    if case.network == "conv1d":
        return Conv1DNetwork(case)
    if case.network != "sequential":
        return Network(case)
    hidden, inner, bias = case.hidden, case.inner, case.network_bias
    layers = nn.Linear(hidden, inner, bias=bias), nn.Linear(inner, hidden, bias=bias)
    return nn.Sequential(layers[0], Activation(case), layers[1])


def make_network(case: Case) -> nn.Module:
    return Mixture(case) if case.experts else plain_network(case)
