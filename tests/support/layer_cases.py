# SPDX-License-Identifier: Apache-2.0
"""Small float64 models around one kind of layer, unsharded and sharded.

A case names its rules; :func:`distances` shards it and measures how far outputs and gradients are
from those of one process.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import deepspeed_autotp
from tests.support.gathered_gradients import gathered_gradients

IN, INNER, OUT = 10, 13, 6
VOCABULARY, HIDDEN = 257, 9


class Pair(nn.Module):
    """A column layer, a pointwise function and a row layer."""

    def __init__(self, column: nn.Module, row: nn.Module) -> None:
        super().__init__()
        self.column = column
        self.row = row

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.row(torch.tanh(self.column(x)))
        return y


class Single(nn.Module):
    """One layer between two functions that need its full output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.layer(torch.sin(x) if x.is_floating_point() else x), dim=-1)


class Fused(nn.Module):
    """Pieces of unequal or equal size in one weight, each used in its own way."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes
        self.column = nn.Linear(IN, sum(sizes))
        self.row = nn.Linear(sizes[0], OUT)

    def forward(self, x: Tensor) -> Tensor:
        y = self.column(x)
        widths = [y.shape[-1] * size // sum(self.sizes) for size in self.sizes]
        first, *rest = y.split(widths, dim=-1)
        gated = torch.tanh(first)
        for piece in rest:
            gated = gated * torch.sigmoid(piece).repeat_interleave(widths[0] // piece.shape[-1], -1)
        z: Tensor = self.row(gated)
        return z


class Normed(nn.Module):
    """A replicated norm over each head of a column layer's output: its gradient is a sum."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.column = nn.Linear(IN, heads * size)
        self.norm = nn.LayerNorm(size)
        self.row = nn.Linear(heads * size, OUT)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.norm(self.column(x).unflatten(-1, (-1, self.size)))
        y: Tensor = self.row(heads.flatten(-2))
        return y


class NormedOneByOne(Normed):
    """With a call for each head, of which ranks have more or fewer."""

    def forward(self, x: Tensor) -> Tensor:
        heads = self.column(x).unflatten(-1, (-1, self.size)).unbind(-2)
        y: Tensor = self.row(torch.cat([self.norm(head) for head in heads], dim=-1))
        return y


class OwnScale(nn.Module):
    """The same with a scale of each head's features that the model itself has."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.column = nn.Linear(IN, heads * size)
        self.scale = nn.Parameter(torch.rand(size))
        self.row = nn.Linear(heads * size, OUT)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.column(x).unflatten(-1, (-1, len(self.scale))) * self.scale
        y: Tensor = self.row(heads.flatten(-2))
        return y


class Scaled(nn.Linear):
    """A subclass that calls what it extends."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x.flip(0)).flip(0)


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


class Quiet(nn.Linear):
    """A subclass with another name only."""


def conv1d(features: int, inputs: int) -> nn.Module:
    """GPT-2's linear with a random bias."""
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(features, inputs)
    nn.init.normal_(layer.get_parameter("bias"))
    return layer


def floats(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    drawn = torch.randn(*shape, generator=draw, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device())


def border_ids() -> Tensor:
    """Ids at both ends of every rank's shard for 2, 3 and 4 ranks, and every 16th."""
    borders = [0, 1, 64, 65, 66, 85, 86, 128, 129, 130, 171, 172, 193, 194, 255, 256]
    return torch.tensor([*borders, *range(0, VOCABULARY, 16), 3, 3, 200]).reshape(2, -1)


@dataclass(frozen=True, slots=True)
class Case:
    """``rules`` are a ``partition_config``'s specifications, or ``styles`` a model's own plan."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor] = lambda: floats(2, 5, IN)
    rules: tuple[dict[str, Any], ...] = ()
    styles: Mapping[str, str] = field(default_factory=dict)
    grain: int = 1


def rule(pattern: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"patterns": [pattern], "partition_type": kind, **more}


PAIR = (rule(r"column\.", "column"), rule(r"row\.", "row"))
CASES: dict[str, Case] = {
    "pair with biases": Case(lambda: Pair(nn.Linear(IN, INNER), nn.Linear(INNER, OUT)), rules=PAIR),
    "pair without biases": Case(
        lambda: Pair(nn.Linear(IN, INNER, bias=False), nn.Linear(INNER, OUT, bias=False)),
        rules=PAIR,
    ),
    "seven features": Case(lambda: Pair(nn.Linear(IN, 7), nn.Linear(7, OUT)), rules=PAIR),
    "as many features as ranks": Case(
        lambda: Pair(nn.Linear(IN, dist.get_world_size()), nn.Linear(dist.get_world_size(), OUT)),
        rules=PAIR,
    ),
    "one token": Case(
        lambda: Pair(nn.Linear(IN, INNER), nn.Linear(INNER, OUT)), lambda: floats(IN), rules=PAIR
    ),
    "no token": Case(
        lambda: Pair(nn.Linear(IN, INNER), nn.Linear(INNER, OUT)), lambda: floats(0, IN), rules=PAIR
    ),
    "gathered column": Case(
        lambda: Single(nn.Linear(IN, INNER)),
        rules=(rule(r"layer\.", "column", gather_output=True),),
    ),
    "gathered column of a plan": Case(
        lambda: Single(nn.Linear(IN, INNER, bias=False)), styles={"layer": "colwise_gather_output"}
    ),
    "row that splits its input": Case(
        lambda: Single(nn.Linear(IN, OUT)), styles={"layer": "rowwise_split_input"}
    ),
    "two equal pieces": Case(
        lambda: Fused((INNER, INNER)),
        rules=(rule(r"column\.", "column", shape=[2, -1]), rule(r"row\.", "row")),
    ),
    "pieces of unequal sizes": Case(
        lambda: Fused((24, 12, 12)),
        rules=(rule(r"column\.", "column", shape=[[24, 12, 12], -1]), rule(r"row\.", "row")),
    ),
    "norm of heads": Case(
        lambda: Normed(5, 3),
        rules=(*PAIR, rule(r"norm\.", "skip", grad_allreduce=True)),
        grain=3,
    ),
    "norm of each head": Case(
        lambda: NormedOneByOne(5, 3),
        rules=(*PAIR, rule(r"norm\.", "skip", grad_allreduce=True)),
        grain=3,
    ),
    "scale of the model": Case(
        lambda: OwnScale(5, 3),
        rules=(*PAIR, rule(r"^scale$", "skip", grad_allreduce=True)),
        grain=3,
    ),
    "gpt-2's linear": Case(lambda: Pair(conv1d(INNER, IN), conv1d(OUT, INNER)), rules=PAIR),
    "gpt-2's linear, gathered": Case(
        lambda: Single(conv1d(INNER, IN)),
        rules=(rule(r"layer\.", "column", gather_output=True),),
    ),
    "gpt-2's linear that splits": Case(
        lambda: Single(conv1d(OUT, IN)), styles={"layer": "rowwise_split_input"}
    ),
    "subclasses": Case(lambda: Pair(Scaled(IN, INNER), Scaled(INNER, OUT)), rules=PAIR),
    "subclass without a forward": Case(
        lambda: Pair(Quiet(IN, INNER), Quiet(INNER, OUT)), rules=PAIR
    ),
    "vocabulary": Case(
        lambda: Single(nn.Embedding(VOCABULARY, HIDDEN)),
        border_ids,
        styles={"layer": "embedding_rowwise"},
    ),
    "vocabulary, ids of 32 bits": Case(
        lambda: Single(nn.Embedding(VOCABULARY, HIDDEN)),
        lambda: border_ids().int(),
        styles={"layer": "embedding_rowwise"},
    ),
    "vocabulary, more ids than rows": Case(
        lambda: Single(nn.Embedding(5, HIDDEN, padding_idx=1)),
        lambda: torch.arange(70).reshape(2, 5, 7) % 5,
        styles={"layer": "embedding_rowwise"},
    ),
    "vocabulary, no token": Case(
        lambda: Single(nn.Embedding(VOCABULARY, HIDDEN)),
        lambda: border_ids()[:0],
        styles={"layer": "embedding_rowwise"},
    ),
    "hidden": Case(
        lambda: Single(nn.Embedding(VOCABULARY, HIDDEN)),
        border_ids,
        styles={"layer": "embedding_colwise"},
    ),
    "vocabulary, scaled": Case(
        lambda: Single(ScaledEmbedding(VOCABULARY, HIDDEN)),
        border_ids,
        styles={"layer": "embedding_rowwise"},
    ),
    "hidden, scaled": Case(
        lambda: Single(ScaledEmbedding(VOCABULARY, HIDDEN)),
        border_ids,
        styles={"layer": "embedding_colwise"},
    ),
} | {
    f"{style}, padding {padding}": Case(
        lambda padding=padding: Single(nn.Embedding(VOCABULARY, HIDDEN, padding_idx=padding)),
        border_ids,
        styles={"layer": f"embedding_{style}"},
    )
    for style in ("rowwise", "colwise")
    for padding in (0, 64, 129, 256)
}


def build(case: Case) -> nn.Module:
    torch.manual_seed(11)
    return case.build().double()


def shard(
    model: nn.Module, case: Case, *, self_check: bool = False, mesh: DeviceMesh | None = None
) -> nn.Module:
    """Over ``mesh``, or all ranks; as a rule without a self-check, which would find what these
    tests measure."""
    config: dict[str, Any] = {"self_check": self_check, "tp_grain_size": case.grain}
    if case.rules:
        config["partition_config"] = {"layer_specs": list(case.rules), "use_default_specs": False}
    if case.styles:
        vars(model)["_tp_plan"] = dict(case.styles)
    return deepspeed_autotp.parallelize(
        model,
        tp_size=None if mesh is not None else dist.get_world_size(),
        mesh=mesh,
        config=config,
        example_inputs={"x": case.inputs()} if self_check else None,
    )


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Output, and gradient of the input where it has one; the parameters' are left in place."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y = model(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    return y.detach(), x.grad


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to the largest element; infinite for other shapes."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp(min=1)) if b.numel() else 0.0


def distances(name: str) -> dict[str, float]:
    """Of the output, the gradient of the input, and that of every parameter."""
    case = CASES[name]
    unsharded, sharded = build(case), shard(build(case), case)
    x = case.inputs()
    (y, dx), (ys, dxs) = run(unsharded, x), run(sharded, x)
    found = {"output": distance(ys, y)}
    if dx is not None and dxs is not None:
        found["input"] = distance(dxs, dx)
    state = deepspeed_autotp.tensor_parallel(sharded)
    assert any(entry.dim >= 0 for entry in state.plan.entries)
    gradients = gathered_gradients(sharded)
    for (key, parameter), own in zip(unsharded.named_parameters(), state.parameters, strict=True):
        entry = state.entry(own)
        assert entry is not None and parameter.grad is not None
        assert entry.dim < 0 or own.shape != parameter.shape, f"{key} is not sharded"
        found[key] = distance(gradients[key], parameter.grad)
    return found
