# SPDX-License-Identifier: Apache-2.0
"""Layers that share an input, in float64 and on every rank."""

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import deepspeed_autotp
from deepspeed_autotp.state.sharded_model import find_tensor_parallel
from tests.support.recorded_collectives import recorded_collectives
from tests.support.small_models import build, tokens

WIDTH, SIZE = 16, 4
RULES: dict[str, Any] = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*\b[qkv]\.weight"], "partition_type": "column"},
        {"patterns": [r".*\bout\.weight"], "partition_type": "row"},
    ],
}


class Attention(nn.Module):
    """``how`` is what k and v are given, and what else happens to the input."""

    def __init__(self, how: str = "same") -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x, other = x * 1, other * 1
        residual = 0 * x
        if self.how == "cross":
            q, k, v = self.q(x), self.k(other), self.v(other)
        elif self.how == "equal":  # the same values in another tensor
            q, k, v = self.q(x), self.k(x.clone()), self.v(x)
        elif self.how == "twice":
            q, k, v = self.q(x), self.k(x) + self.k(x), self.v(x)
        elif self.how == "unused":
            q, k = self.q(x), self.k(x)
            v = q * 1
        elif self.how == "between":  # another use of the input between the layers
            q, residual = self.q(x), x * 2
            k, v = self.k(x), self.v(x)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        heads = (y.unflatten(-1, (-1, SIZE)).transpose(-2, -3) for y in (q, k, v))
        y = scaled_dot_product_attention(*heads)
        z: Tensor = self.out(y.transpose(-2, -3).flatten(-2))
        return z + residual


def pair(how: str = "same", *, overlap: bool = True) -> tuple[nn.Module, nn.Module]:
    """The same model unsharded and sharded."""
    torch.manual_seed(0)
    unsharded = Attention(how).double()
    torch.manual_seed(0)
    sharded = Attention(how).double()
    config = {"partition_config": RULES, "self_check": False, "tp_overlap_comm": overlap}
    return unsharded, deepspeed_autotp.parallelize(
        sharded, tp_size=dist.get_world_size(), config=config
    )


def inputs() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    x, other = (torch.randn(2, 5, WIDTH, generator=draw, dtype=torch.float64) for _ in range(2))
    return x.requires_grad_(), other.requires_grad_()


def slope(y: Tensor) -> Tensor:
    """A loss whose gradient differs in every element."""
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum()


def gradients(model: nn.Module, x: Tensor, other: Tensor) -> dict[str, Tensor | None]:
    """Of full weights and of inputs; those of the model are zero afterwards."""
    found: dict[str, Tensor | None] = {"x": x.grad, "other": other.grad}
    state = find_tensor_parallel(model)
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        entry = None if state is None else state.entry(parameter)
        if state is not None and grad is not None and entry is not None and entry.dim >= 0:
            grad = state.gather(grad, entry=entry)
        found[name] = grad
    model.zero_grad()
    return found


def distance(unsharded: dict[str, Tensor | None], sharded: dict[str, Tensor | None]) -> float:
    """Largest difference; infinite where one has a gradient and the other none."""
    worst = 0.0
    for name, expected in unsharded.items():
        got = sharded[name]
        if (got is None) != (expected is None):
            return float("inf")
        if got is not None and expected is not None:
            worst = max(worst, float((got - expected).abs().max()))
    return worst


def run(model: nn.Module, backward: Callable[[Tensor, Tensor], None]) -> dict[str, Tensor | None]:
    x, other = inputs()
    backward(slope(model(x, other)), x)
    return gradients(model, x, other)


def of_case(how: str, overlap: bool) -> tuple[float, int]:
    """How far gradients are from one process, and the sums of a backward pass."""
    unsharded, sharded = pair(how, overlap=overlap)
    sharded(*inputs())  # the first call compares the batches of the ranks
    x, other = inputs()
    loss = slope(sharded(x, other))
    with recorded_collectives() as calls:
        loss.backward()
    got = gradients(sharded, x, other)
    return distance(run(unsharded, lambda loss, _: loss.backward()), got), len(calls)


def partial_passes() -> dict[str, float]:
    """Backward passes that end between the layers and the entry, or run twice."""
    unsharded, sharded = pair()

    def twice(loss: Tensor, x: Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    def bias_first(loss: Tensor, x: Tensor) -> None:
        model = current[0]
        torch.autograd.grad(loss, [model.q.bias, model.k.bias], retain_graph=True)
        loss.backward()

    def input_first(loss: Tensor, x: Tensor) -> None:
        torch.autograd.grad(loss, [x], retain_graph=True)
        loss.backward()

    def weight_alone(loss: Tensor, x: Tensor) -> None:
        model = current[0]
        (model.k.weight.grad,) = torch.autograd.grad(loss, [model.k.weight])

    found = {}
    current: list[Any] = []
    for backward in (twice, bias_first, input_first, weight_alone):
        got = []
        for model in (unsharded, sharded):
            current[:] = [model]
            got.append(run(model, backward))
        found[backward.__name__] = distance(*got)
    return found


def unused_with_shared_heads() -> dict[str, bool]:
    """One key/value head for all ranks, and a v that is never called."""
    model = build("llama", tied=False, num_key_value_heads=1)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    attention = model.model.layers[0].self_attn
    attention.v_proj.forward = lambda x: attention.k_proj(x) * 1
    ids = tokens(0)
    model(input_ids=ids, labels=ids).loss.backward()
    return {
        name: getattr(attention, f"{name}_proj").weight.grad is not None for name in ("q", "k", "v")
    }


def freed_at_once() -> bool:
    """Whether a sharded model is freed without the garbage collector, which knows no memory."""
    _, sharded = pair()
    slope(sharded(*inputs())).backward()
    seen = weakref.ref(sharded.q.weight)
    gc.collect()
    gc.disable()
    try:
        del sharded
        return seen() is None
    finally:
        gc.enable()


def frozen() -> tuple[float, list[str]]:
    """With q and k frozen: the distance, and the shapes of the products formed in backward."""
    unsharded, sharded = pair()
    for model in (unsharded, sharded):
        for layer in (model.q, model.k):
            layer.requires_grad_(False)
    expected = run(unsharded, lambda loss, _: loss.backward())
    return distance(expected, run(sharded, lambda loss, _: loss.backward())), [
        name for name, gradient in gradients_of(sharded).items() if gradient
    ]


def gradients_of(model: nn.Module) -> dict[str, bool]:
    """Which weights a backward pass gives a gradient."""
    slope(model(*inputs())).backward()
    return {name: p.grad is not None for name, p in model.named_parameters()}


def kept(how: str) -> dict[str, bool]:
    """What is still there of an input after a forward, a backward, and a forward thrown away."""
    _, sharded = pair("cross" if how == "cross" else "same")
    seen: list[weakref.ref[Tensor]] = []
    sharded.q.register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))

    def forward() -> Tensor:
        x, other = inputs()
        if how == "checkpointed":
            return slope(checkpoint(sharded, x, other, use_reentrant=False))
        return slope(sharded(x, other))

    with torch.no_grad():
        forward()
    found = {"no_grad": _alive(seen)}
    loss = forward()
    loss.backward()
    del loss
    found["backward"] = _alive(seen)
    forward()
    found["thrown away"] = _alive(seen)
    return found


def _alive(seen: list["weakref.ref[Tensor]"]) -> bool:
    """Whether anything holds on to them: a thread of gloo has what it summed, and so the graph
    behind it, for a moment longer than the call that waits for the sum."""
    deadline = time.monotonic() + 2.0
    while any(ref() is not None for ref in seen):
        if time.monotonic() > deadline:
            return True
        gc.collect()
        time.sleep(0.01)
    return False


def unused_in_engine(zero: int) -> list[bool]:
    """Whether the layer that is never called stays without a gradient and keeps its weight."""
    torch.manual_seed(0)
    model = Attention("unused")
    section = {"autotp_size": 2, "partition_config": RULES, "self_check": False}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "tensor_parallel": section,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)
    before = deepspeed_autotp.full_state_dict(engine)
    x, other = (t.detach().float() for t in inputs())
    engine.backward(slope(engine(x, other)))
    engine.step()
    after = deepspeed_autotp.full_state_dict(engine)
    return [torch.equal(t, before[n]) == (n[0] == "v") for n, t in after.items()]
