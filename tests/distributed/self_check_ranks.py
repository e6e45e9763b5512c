# SPDX-License-Identifier: Apache-2.0
"""What happens in the self-check."""

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.engine_config import initialize
from tests.support.handmade_model import PARTITION, build_handmade, example, single_curve
from tests.support.log_records import LoggedMessages, logged_warnings
from tests.support.loss_curves import single_losses
from tests.support.model_snapshot import refusal
from tests.support.small_models import build

Q_AS_ROW = {
    "layer_specs": [{"patterns": [r".*\.q_proj\.weight$"], "partition_type": "row"}],
    "use_default_specs": False,
}
# What llama needs without its o_proj.
NO_OUTPUT = {
    "layer_specs": [{"patterns": [r".*\.[qkv]_proj\.weight$"], "partition_type": "column"}],
    "use_default_specs": False,
}
# As llama's attention, for names that have nothing before them.
FLAT_ATTENTION = {
    "layer_specs": [
        {"patterns": [r"[qkv]_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r"o_proj\.weight$"], "partition_type": "row"},
    ],
}
NO_NORM_SUM = {
    "layer_specs": [
        {"patterns": [r".*\.[qkv]_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.o_proj\.weight$"], "partition_type": "row"},
    ],
    "use_default_specs": False,
}


def refused_plan(family: str, partition: dict[str, Any]) -> str:
    """A plan that makes another model, seen by initialize."""
    model = build(family, tied=False)
    return refusal(
        model, lambda: initialize(model, {"autotp_size": 2, "partition_config": partition})
    )


def fail_in_self_check(rank: int, place: str) -> str:
    """One rank raises in the self-check: in the unsharded model, or between two collectives of the
    sharded one, forward or backward."""
    from deepspeed_autotp.layers.linear import RowLinear

    model = build("llama", tied=False)
    layer = model.model.layers[1].mlp.down_proj
    fails = dist.get_rank() == rank

    def forward(module: nn.Module, args: Any) -> None:
        if fails and (place == "unsharded" or isinstance(module, RowLinear)):
            raise RuntimeError("out of luck")

    def backward(module: nn.Module, gradients: Any) -> None:
        if fails and isinstance(module, RowLinear):
            raise RuntimeError("out of luck")

    if place == "backward":
        layer.register_full_backward_pre_hook(backward)
    else:
        layer.register_forward_pre_hook(forward)
    # The user's rules: what fails under them is an error.
    section = {"autotp_size": 2, "preset_model": "llama"}
    return refusal(model, lambda: initialize(model, section))


def refused_with_other_weights() -> str:
    """Ranks with different weights keep their own when the plan is wrong."""
    model = build("llama", tied=False, seed=dist.get_rank())
    return refusal(
        model, lambda: initialize(model, {"autotp_size": 2, "partition_config": Q_AS_ROW})
    )


def handmade_refusal(partition: dict[str, Any], inputs: bool) -> str:
    """A wrong plan of a model without a configuration, through parallelize."""
    model = build_handmade()
    section = {"partition_config": partition, "self_check": True}
    given = example() if inputs else None
    return refusal(
        model,
        lambda: deepspeed_autotp.parallelize(
            model, tp_size=2, config=section, example_inputs=given
        ),
    )


def unchecked_plan() -> list[str]:
    """The kinds of a wrong plan that goes through with the self-check switched off."""
    model = build("llama", tied=False)
    section = {"autotp_size": 2, "partition_config": Q_AS_ROW, "self_check": False}
    engine, *_ = initialize(model, section)
    plan = deepspeed_autotp.tensor_parallel(engine).plan
    return sorted({entry.kind for entry in plan.entries})


def insisted_without_inputs() -> str:
    """self_check through initialize, which has no place for example inputs."""
    model = build_handmade()
    section = {"autotp_size": 2, "partition_config": PARTITION, "self_check": True}
    return refusal(model, lambda: initialize(model, section))


class Peculiar(nn.Module):
    """Counts its calls in every way there is, and changes the RNG state in any mode."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.unused = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(1))
        self.count = 0
        self.shapes: list[Any] = []
        self.merged = False

    def train(self, mode: bool = True) -> "Peculiar":
        self.merged = not mode
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.count += 1
        self.shapes.append(x.shape)
        self.last = x
        x = F.dropout(x, 0.5) * (1 + random.random())
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


@dataclass(slots=True)
class Wrapped:
    """An output as somebody's own class."""

    hidden: torch.Tensor
    more: tuple[torch.Tensor, ...] = ()


class Opaque:
    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class Wrapping(nn.Module):
    """Its output is one that ``wrap`` makes."""

    def __init__(self, wrap: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> object:
        return self.wrap(self.up(x))


def shard_wrapping(model: nn.Module) -> list[str]:
    """What is warned of under a plan with which each rank gives a partial sum."""
    specs = [{"patterns": [r"up\.weight"], "partition_type": "column"}]
    inputs = {"x": torch.randn(3, 8, generator=torch.Generator().manual_seed(1))}
    with logged_warnings() as warnings:
        deepspeed_autotp.parallelize(
            model,
            tp_size=2,
            config={"partition_config": {"layer_specs": specs}},
            example_inputs=inputs,
        )
    return list(warnings)


def refused_parts() -> str:
    """A plan of which only the output, a dataclass, shows that it is wrong."""
    torch.manual_seed(0)
    model = Wrapping(Wrapped)
    return refusal(model, lambda: shard_wrapping(model))


def unseen_parts() -> list[str]:
    """The same with an output that nobody can look into."""
    torch.manual_seed(0)
    return shard_wrapping(Wrapping(Opaque))


PECULIAR = {
    "layer_specs": [
        {"patterns": [r"up\.weight"], "partition_type": "column"},
        {"patterns": [r"down\.weight"], "partition_type": "row"},
    ]
}


def peculiar_model() -> dict[str, Any]:
    """What a self-check that succeeds leaves behind; the ranks start with other RNG states."""
    torch.manual_seed(0)
    model = Peculiar()
    model.up.bias.requires_grad_(False)
    model.unused.training = False
    torch.manual_seed(50)
    random.seed(60 + dist.get_rank())
    numbers, python = torch.get_rng_state(), random.getstate()
    deepspeed_autotp.parallelize(
        model,
        tp_size=2,
        config={"partition_config": PECULIAR, "self_check": True},
        example_inputs={"x": torch.randn(3, 8, generator=torch.Generator().manual_seed(1))},
    )
    return {
        "calls": float(model.calls),
        "count": model.count,
        "shapes": list(model.shapes),
        "last": "last" in vars(model),
        "merged": model.merged,
        "modes": [module.training for module in model.modules()],
        "gradients": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad is None for p in model.parameters()],
        "numbers": torch.equal(numbers, torch.get_rng_state()) and python == random.getstate(),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "classes": [type(module).__name__ for module in model.modules()],
    }


def frozen_model() -> tuple[list[bool], list[bool], bool]:
    """requires_grad before and after, and whether any gradient came to be."""
    model = build("qwen3", tied=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name and "norm" not in name)
    before = [p.requires_grad for p in model.parameters()]
    deepspeed_autotp.parallelize(model, tp_size=2)
    after = [p.requires_grad for p in model.parameters()]
    ids = torch.arange(12).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    return before, after, any(p.grad is not None for p in model.parameters() if not p.requires_grad)


class Scaled(nn.Module):
    """Scales by the largest value of the call before, as layers do for 8-bit numbers. It is in a
    "buffer", in an attribute that is a "tensor", in one that is "another" each time, or a
    "number"."""

    largest: Any

    def __init__(self, inner: nn.Module, kept: str) -> None:
        super().__init__()
        self.inner = inner
        self.kept = kept
        if kept == "buffer":
            self.register_buffer("largest", torch.ones(()))
        else:
            self.largest = 1.0 if kept == "number" else torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        largest = x.detach().abs().max() / 100
        y: Tensor = self.inner(x) / (self.largest + 0.0)
        if self.kept in ("buffer", "tensor"):
            self.largest.copy_(largest)
        else:
            self.largest = float(largest) if self.kept == "number" else largest
        return y


def running_number(kept: str) -> list[list[float]]:
    """Losses of three steps of a model that keeps such a number between layers, alone and sharded;
    its layers there are sharded individually."""
    curves = []
    for ranks in (1, dist.get_world_size()):
        model = build("llama", tied=False)
        mlp: Any = model.get_submodule("model.layers.1.mlp")
        mlp.act_fn = Scaled(mlp.act_fn, kept)
        if ranks > 1:
            deepspeed_autotp.parallelize(model, tp_size=ranks)
        curves.append(single_losses(model, clip=0.0, steps=3))
    return curves


class KeyBias(nn.Module):
    """Attention without positions: softmax makes the gradient of the key bias vanish."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, 4)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: torch.Tensor = self.o_proj(y)
        return out


def vanishing_gradient() -> bool:
    """Whether the self-check accepts a right plan of it."""
    torch.manual_seed(0)
    model = KeyBias()
    deepspeed_autotp.parallelize(
        model,
        tp_size=2,
        config={"partition_config": FLAT_ATTENTION},
        example_inputs={"x": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))},
    )
    return type(model.k_proj).__name__ == "ColumnLinear"


def messages_of(kind: str) -> list[str]:
    """What is logged for a model of which only the inputs of the self-check are wrong."""
    with LoggedMessages(logging.INFO, form="%(levelname)s: %(message)s") as texts:
        if kind == "unknown inputs":
            section = {"autotp_size": 2, "partition_config": PARTITION}
            initialize(build_handmade(), section)
        elif kind == "other weights":
            initialize(build("llama", tied=False, seed=dist.get_rank()), {"autotp_size": 2})
        elif kind == "not finite":
            model = build("llama", tied=False)
            with torch.no_grad():
                model.model.norm.weight.fill_(float("nan"))
            model.register_forward_hook(lambda module, args, output: None)  # no twin
            initialize(model, {"autotp_size": 2})
        elif kind == "wrong guess":
            model = build("llama", tied=False)
            model.register_forward_pre_hook(_refuse_all)
            initialize(model, {"autotp_size": 2})
    return texts


def _refuse_all(module: nn.Module, args: Any) -> None:
    raise ValueError("pixel_values are missing")


def handmade_curves() -> tuple[list[float], list[float]]:
    """Losses through parallelize with example inputs, and of one process."""
    expected = single_curve(build_handmade(), rate=0.5)
    model = build_handmade()
    deepspeed_autotp.parallelize(
        model,
        tp_size=dist.get_world_size(),
        config={"partition_config": PARTITION, "self_check": True},
        example_inputs=example(),
    )
    return single_curve(model, rate=0.5), expected
