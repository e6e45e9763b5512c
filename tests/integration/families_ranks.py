# SPDX-License-Identifier: Apache-2.0
"""Models whose layers are called as a row of the family table says, and models of transformers
that bring no plan; trained on every rank by tests.integration.test_families."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed_autotp
from deepspeed_autotp._core import family_blocks
from tests.support.log_records import logged_warnings
from tests.support.loss_curves import worst_difference

HIDDEN, HEADS, SIZE, INNER = 16, 4, 4, 24
STEPS, RATE = 3, 0.1


@dataclass(frozen=True, slots=True)
class Outcome:
    """Losses against one process, the share of the parameters that this rank holds, the sources
    of the sharded weights, and what was warned of."""

    apart: float
    share: float
    sources: frozenset[str]
    warnings: tuple[str, ...]


class Holder(nn.Module):
    """Children by dotted names; an attention module has the head counts."""

    def put(self, path: str, layer: nn.Module) -> None:
        place, _, leaf = path.rpartition(".")
        module: nn.Module = self
        for part in filter(None, place.split(".")):
            if part not in module._modules:
                module.add_module(part, Holder())
            module = module.get_submodule(part)
        module.add_module(leaf, layer)


class Named(Holder):
    """One block with a residual: attention where ``heads``, else a gated or plain MLP.

    ``mix`` is what is done to a fused q|k|v of ``[..., 3 * HIDDEN]``.
    """

    def __init__(
        self,
        output: str,
        inputs: tuple[str, ...],
        heads: bool,
        mix: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.mix = heads, mix
        self.taker, self.givers = output, inputs
        inner = HIDDEN if heads else INNER
        fused = len(inputs) == 1 and (heads or "gate" in inputs[0] or inputs[0] == "Wi")
        for path in inputs:
            width = inner * (1 if not fused else 3 if heads else 2)
            self.put(path, nn.Linear(HIDDEN, width))
        self.put(output, nn.Linear(inner, HIDDEN))
        if heads:
            place = inputs[0].rpartition(".")[0]
            attention = self if inputs[0].endswith(".linear") else self.get_submodule(place)
            vars(attention).update(num_heads=HEADS, head_dim=SIZE)

    def forward(self, x: Tensor) -> Tensor:
        given = [self.get_submodule(path)(x) for path in self.givers]
        if self.heads:
            parts = given if len(given) == 3 else (self.mix or _thirds)(given[0])
            q, k, v = (part.unflatten(-1, (-1, SIZE)).transpose(1, 2) for part in parts)
            inner = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            inner = inner.transpose(1, 2).flatten(2)
        else:
            gate, up = given if len(given) == 2 else (given[0], None)
            if up is None and gate.shape[-1] > self.get_submodule(self.taker).weight.shape[1]:
                gate, up = gate.chunk(2, dim=-1)
            inner = F.silu(gate) if up is None else F.silu(gate) * up
        y: Tensor = x + self.get_submodule(self.taker)(inner)
        return y


def _thirds(fused: Tensor) -> tuple[Tensor, ...]:
    return fused.chunk(3, dim=-1)


def interleaved(fused: Tensor) -> tuple[Tensor, ...]:
    """q, k and v of one head beside each other, as no name of a layer tells."""
    return tuple(part.flatten(-2) for part in fused.unflatten(-1, (-1, 3, SIZE)).unbind(-2))


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def example(step: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(100 + step)
    return {"x": torch.randn(2, 6, HIDDEN, generator=draw)}


def _curve(model: nn.Module, loss: Callable[[nn.Module, int], Tensor]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        value = loss(model, step)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    return losses


def _compare(
    build: Callable[[], nn.Module],
    loss: Callable[[nn.Module, int], Tensor],
    inputs: Mapping[str, Any] | None,
) -> Outcome:
    alone, model = build(), build()
    expected = _curve(alone, loss)
    with logged_warnings() as texts:
        deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), example_inputs=inputs)
    losses = _curve(model, loss)
    deepspeed_autotp.check_replicas(model)
    full = deepspeed_autotp.full_state_dict(model)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(full[name], parameter.detach(), rtol=1e-4, atol=1e-5)
    entries = deepspeed_autotp.tensor_parallel(model).plan.entries
    return Outcome(
        apart=worst_difference(losses, expected),
        share=_size(model) / _size(alone),
        sources=frozenset(entry.source for entry in entries if entry.dim >= 0),
        warnings=tuple(texts),
    )


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _stack_loss(model: nn.Module, step: int) -> Tensor:
    value: Tensor = model(**example(step))
    return value


def every_row() -> dict[str, Outcome]:
    """A model for each row of the table that is for any model."""
    found = {}
    for output, inputs, heads, model_type in family_blocks():
        if model_type is not None:
            continue

        def build(row: tuple[str, tuple[str, ...], bool] = (output, inputs, heads)) -> nn.Module:
            torch.manual_seed(0)
            return Stack(Named(*row), Named(*row))

        found[f"{' '.join(inputs)} -> {output}"] = _compare(build, _stack_loss, example())
    return found


def wrong_guess() -> Outcome:
    """Attention whose fused layer is not what its name means, beside an MLP that is."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        attention = Named("out_proj", ("qkv_proj",), True, interleaved)
        return Stack(attention, Named("fc2", ("fc1",), False))

    return _compare(build, _stack_loss, example())


def never_ran() -> Outcome:
    """A block that no input reaches is not sharded as a pair, as its output was not compared."""

    class Half(Stack):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.blocks[0](x)
            return y.square().mean()

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Half(Named("fc2", ("fc1",), False), Named("wo", ("wi",), False))

    return _compare(build, _stack_loss, example())


class Reader(nn.Linear):
    """Reads its weight itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Odd(nn.Module):
    """Large layers that no pair is made of: one is as others are, one reads its weight itself, and
    of one the weight is read without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict(
            {"fc1": nn.Linear(HIDDEN, INNER), "fc2": nn.Linear(INNER, HIDDEN)}
        )
        self.plain = nn.Linear(HIDDEN, HIDDEN)
        self.reader = Reader(HIDDEN, HIDDEN, bias=False)
        self.idle = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.block["fc2"](F.silu(self.block["fc1"](x)))
        y = self.reader(torch.tanh(self.plain(x)))
        return F.linear(y, self.idle.weight).square().mean()


def individually_sharded() -> tuple[Outcome, dict[str, str]]:
    """With the kind of each weight of :class:`Odd`'s own."""
    models = []

    def build() -> nn.Module:
        torch.manual_seed(0)
        models.append(Odd())
        return models[-1]

    outcome = _compare(build, _stack_loss, example())
    entries = deepspeed_autotp.tensor_parallel(models[-1]).plan.entries
    return outcome, {e.name: e.kind for e in entries if not e.name.startswith("block.")}


def without_inputs(names: tuple[str, tuple[str, ...], bool]) -> str:
    """What a guess is refused with that cannot be tried, or whose layers have no known names."""
    model = Stack(Named(*names))
    section = {} if names[1][0] == "fc1" else {"self_check": False}
    try:
        deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=section)
    except ValueError as error:
        return str(error)
    return ""


def library_model(model_type: str, changes: Mapping[str, Any]) -> Outcome:
    """A model of transformers, shrunk, that has no plan of its own."""
    from transformers import AutoModelForCausalLM

    from benchmarks import shrink

    def build() -> nn.Module:
        if not changes:
            return shrink.build(model_type)
        config = shrink.config(model_type)
        for key, value in changes.items():
            setattr(config, key, value)
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return model.train()

    def loss(model: nn.Module, step: int) -> Tensor:
        value: Tensor = model(**shrink.batch(model_type, step)).loss
        return value

    return _compare(build, loss, None)


def library_models(wanted: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, Outcome]:
    return {name: library_model(*each) for name, each in wanted.items()}
