# SPDX-License-Identifier: Apache-2.0
"""What the ranks do beside the cases of tests.support.layer_cases."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deepspeed_autotp
from tests.support.layer_cases import (
    CASES,
    HIDDEN,
    IN,
    INNER,
    OUT,
    PAIR,
    VOCABULARY,
    Case,
    Pair,
    Single,
    border_ids,
    build,
    distance,
    distances,
    shard,
)
from tests.support.raised_error import raised_error


class OwnForward(nn.Linear):
    """A subclass that reads the weight itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * 2


class OwnForwardEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


def embedding_case(**options: Any) -> Case:
    return Case(
        lambda: Single(nn.Embedding(VOCABULARY, HIDDEN, **options)),
        border_ids,
        styles={"layer": "embedding_rowwise"},
    )


def own_forward_case(kind: str) -> Case:
    """A layer of that kind reads its weight itself."""
    if kind == "embedding":
        return Case(
            lambda: Single(OwnForwardEmbedding(VOCABULARY, HIDDEN)),
            border_ids,
            styles={"layer": "embedding_colwise"},
        )
    column = OwnForward if kind == "column" else nn.Linear
    row = OwnForward if kind == "row" else nn.Linear
    return Case(
        lambda: Pair(column(IN, INNER, bias=False), row(INNER, OUT, bias=False)), rules=PAIR
    )


def own_forward(kind: str) -> tuple[str, str]:
    """What the self-check raises, after which the model is as it was, and the model without one."""
    case = own_forward_case(kind)
    model = build(case)
    before = [type(module) for module in model.modules()]
    in_self_check = raised_error(lambda: shard(model, case, self_check=True))
    assert [type(module) for module in model.modules()] == before
    shard(model, case)
    return in_self_check, raised_error(lambda: model(case.inputs()))


def option(name: str, value: Any, style: str) -> str:
    """What is raised for an embedding with an option; the model is as it was."""
    case = embedding_case(**{name: value})
    case.styles["layer"] = style  # type: ignore[index]
    model = build(case)
    text = raised_error(lambda: shard(model, case))
    assert type(model.layer) is nn.Embedding and model.layer.weight.shape == (VOCABULARY, HIDDEN)
    return text


def strange_ids(strange: int) -> str:
    """What an id outside the vocabulary raises."""
    model = shard(build(embedding_case()), embedding_case())
    return raised_error(lambda: model(torch.tensor([[3, strange]])))


def resized() -> str:
    """What an embedding raises whose weight was replaced, as transformers' resizing does."""
    model = shard(build(embedding_case()), embedding_case())
    model.get_submodule("layer").weight.data = torch.zeros(300, HIDDEN, dtype=torch.float64)
    return raised_error(lambda: model(border_ids()))


def embedding_of(name: str) -> tuple[dict[str, bool], tuple[bool, bool]]:
    """Whether a sharded vocabulary of a dtype gives the bits of a full one: plain, with activation
    checkpointing, under autocast, and its gradient; and whether the output of a frozen one wants
    a gradient and is the same."""
    dtype: torch.dtype = getattr(torch, name)
    case = embedding_case(padding_idx=64)
    unsharded, sharded = build(case).to(dtype), shard(build(case).to(dtype), case)
    ids = case.inputs()
    layer = sharded.get_submodule("layer")
    rows = sharded.get_parameter("layer.weight")
    factor = torch.linspace(-1, 2, HIDDEN).to(dtype)
    plain = layer(ids)
    expected = unsharded.get_submodule("layer")(ids)
    again = checkpoint(layer, ids, use_reentrant=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer(ids)
    for y in (expected, again):
        (y * factor).sum().backward()
    gradient = unsharded.get_parameter("layer.weight").grad
    state = deepspeed_autotp.tensor_parallel(sharded)
    assert rows.grad is not None and gradient is not None
    gathered = state.gather(rows.grad, entry=state.entry(rows))
    rows.requires_grad_(False)
    still = layer(ids)
    same = {
        "output": torch.equal(plain, expected),
        "checkpointed": torch.equal(again, expected),
        "autocast": cast.dtype == dtype and torch.equal(cast, expected),
        "gradient": torch.equal(gathered, gradient),
    }
    return same, (still.requires_grad, torch.equal(still, expected))


def twice_of_an_embedding() -> str:
    """What differentiating the gradient of a sharded vocabulary raises."""
    model = shard(build(embedding_case()), embedding_case())
    rows = model.get_parameter("layer.weight")
    output = model(embedding_case().inputs())
    loss = output.square().sum()
    return raised_error(lambda: torch.autograd.grad(loss, rows, create_graph=True))


def dtypes(name: str) -> tuple[list[torch.dtype], list[torch.dtype], float]:
    """Of output and gradients under autocast: of the unsharded model, of the sharded one; and how
    far the outputs are apart."""
    case = CASES[name]
    models = [build(case).float() for _ in range(2)]
    shard(models[1], case)
    found, outputs = [], []
    for model in models:
        x = case.inputs().float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        y.float().sum().backward()
        assert x.grad is not None
        found.append([y.dtype, x.grad.dtype, *(p.grad.dtype for p in model.parameters())])
        outputs.append(y.detach().float())
    return found[0], found[1], distance(outputs[1], outputs[0])


def without_gradients(name: str) -> dict[str, float]:
    """Distances of the output where autograd is off, in either way."""
    case = CASES[name]
    unsharded, sharded = build(case), shard(build(case), case)
    found = {}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found[mode.__name__] = distance(sharded(case.inputs()), unsharded(case.inputs()))
    return found


def twice(name: str) -> list[str]:
    """What asking for gradients that can be differentiated raises, of the input and of weights,
    whose own graph would not lead to the error of torch's ``once_differentiable``."""
    case = CASES[name]
    model = shard(build(case), case)
    x = case.inputs().requires_grad_()
    found = []
    for inputs in ([x], list(model.parameters())):
        loss = model(x).square().sum()
        found.append(
            raised_error(functools.partial(torch.autograd.grad, loss, inputs, create_graph=True))
        )
    return found


def twice_of_a_sum() -> str:
    """The same for a parameter whose gradient is summed over the ranks by a hook, of a loss that
    is formed of it alone."""
    case = CASES["scale of the model"]
    model = shard(build(case), case)
    loss = model.get_parameter("scale").square().sum()
    return raised_error(lambda: loss.backward(create_graph=True))


def faces() -> dict[str, Any]:
    """What code that looks at the layers sees."""
    case = CASES["pair with biases"]
    model = shard(build(case), case)
    column, row = model.get_submodule("column"), model.get_submodule("row")
    assert isinstance(column, nn.Linear) and isinstance(row, nn.Linear)
    return {
        "column": (column.in_features, column.out_features, tuple(column.weight.shape)),
        "row": (row.in_features, row.out_features, tuple(row.weight.shape)),
        "repr": repr(model),
    }


def all_distances() -> dict[str, dict[str, float]]:
    return {name: distances(name) for name in CASES}
