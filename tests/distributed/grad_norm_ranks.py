# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_grad_norm.py do."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from tests.support.gathered_gradients import gathered_gradients
from tests.support.small_models import build, tokens
from tests.support.training_loops import loss_of

SCALE = 50.0


def with_gradients(dtype: torch.dtype, is_sharded: bool, **changes: Any) -> nn.Module:
    """Gradients of any length, from float64 rounded to ``dtype``."""
    model = build("llama", tied=changes.pop("tied", False), **changes).double()
    if is_sharded:
        deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    (SCALE * loss_of(model, tokens(0))).backward()
    gradients = [p.grad for p in model.parameters()]
    model.to(dtype)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is not None
        parameter.grad = gradient.to(dtype)
    return model


def clip(dtype: torch.dtype, most: float, changes: dict[str, Any]) -> dict[str, Any]:
    """The norm and the clipped gradients against torch's on one process."""
    unsharded = with_gradients(dtype, False, **changes)
    model = with_gradients(dtype, True, **changes)
    expected = nn.utils.clip_grad_norm_(list(unsharded.parameters()), most, foreach=False)
    norm = deepspeed_autotp.clip_grad_norm_(model, most)
    own = gathered_gradients(model)
    worst = 0.0
    for name, parameter in unsharded.named_parameters():
        assert parameter.grad is not None
        difference = (own[name].double() - parameter.grad.double()).abs().max()
        worst = max(worst, float(difference / parameter.grad.double().abs().max()))
    return {
        "dtype": norm.dtype,
        "shape": norm.shape,
        "norm": abs(float(norm) / float(expected.double()) - 1),
        "gradients": worst,
    }


def not_finite(value: float) -> tuple[float, float, list[bool]]:
    """The norms, and which gradients are not finite, where one rank's gradient has ``value``."""
    found = []
    for is_sharded in (False, True):
        model = with_gradients(torch.float32, is_sharded)
        weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        assert weight.grad is not None
        if not is_sharded or dist.get_rank() == 0:
            weight.grad[0, 0] = value
        if is_sharded:
            norm = deepspeed_autotp.clip_grad_norm_(model, 1.0)
            gradients = gathered_gradients(model)
        else:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((float(norm), {n: g.isnan().sum().item() for n, g in gradients.items()}))
    (first, nans), (second, own) = found
    return first, second, [nans[name] == own[name] for name in nans]


def later() -> tuple[float, float]:
    """Norms where some weights have no gradient, and one was added after sharding."""
    found = []
    for is_sharded in (False, True):
        model = with_gradients(torch.float64, is_sharded)
        model.get_parameter("model.layers.0.mlp.down_proj.weight").grad = None
        model.get_parameter("model.norm.weight").grad = None
        torch.manual_seed(2)
        model.value = nn.Linear(64, 1).double()
        model.value.weight.grad = torch.full((1, 64), 3.0, dtype=torch.float64)
        if is_sharded:
            norm = deepspeed_autotp.clip_grad_norm_(model, 1.0)
        else:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        found.append(float(norm))
        assert float(model.value.weight.grad[0, 0]) == 3.0 / (found[-1] + 1e-6)
    return found[0], found[1]


class Reward(nn.Module):
    """A sharded model inside another, with a head of its own."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.backbone = backbone
        self.value = nn.Linear(64, 1).double()
        self.value.weight.grad = torch.full((1, 64), 3.0, dtype=torch.float64)


def around() -> tuple[float, float, bool, str]:
    """Norms of a model with a sharded submodule, whether its full weights come out, and what two
    such submodules raise."""
    unsharded = Reward(with_gradients(torch.float64, False))
    model = Reward(with_gradients(torch.float64, True))
    expected = float(nn.utils.clip_grad_norm_(unsharded.parameters(), 1.0))
    norm = float(deepspeed_autotp.clip_grad_norm_(model, 1.0))
    full = deepspeed_autotp.full_state_dict(model)
    same = all(torch.equal(full[name], tensor) for name, tensor in unsharded.state_dict().items())
    pair = nn.ModuleList([model, with_gradients(torch.float64, True)])
    try:
        deepspeed_autotp.clip_grad_norm_(pair, 1.0)
    except ValueError as error:
        return expected, norm, same, str(error)
    return expected, norm, same, "nothing"


def empty() -> tuple[float, bool]:
    """The norm of a model without gradients; and whether an unsharded one is clipped like torch."""
    model = deepspeed_autotp.parallelize(build("llama", tied=False), tp_size=dist.get_world_size())
    norm = float(deepspeed_autotp.clip_grad_norm_(model, 1.0))
    unsharded = [with_gradients(torch.float32, False) for _ in range(2)]
    first = deepspeed_autotp.clip_grad_norm_(unsharded[0], 0.5)
    same = torch.equal(first, nn.utils.clip_grad_norm_(unsharded[1].parameters(), 0.5))
    pairs = zip(unsharded[0].parameters(), unsharded[1].parameters(), strict=True)
    return norm, same and all(torch.equal(a.grad, b.grad) for a, b in pairs)
