# SPDX-License-Identifier: Apache-2.0
"""What the tests of gradients that are summed over the ranks run on ranks."""

import copy
import functools
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.func import functional_call

import deepspeed_autotp
from tests.support.gathered_gradients import gathered_gradients
from tests.support.layer_cases import distance
from tests.support.raised_error import raised_error
from tests.support.small_models import build, tokens
from tests.support.training_loops import loss_of

RATE = 0.1


def penalty(model: nn.Module) -> Tensor:
    return torch.stack([p.square().sum() for p in model.parameters()]).sum() * 0.3


def added(model: nn.Module) -> None:
    (loss_of(model, tokens(0)) + penalty(model)).backward()


def apart(model: nn.Module) -> None:
    """The penalty first, in a backward of its own; and as another forward of two."""
    penalty(model).backward()
    for step in range(2):
        loss_of(model, tokens(step)).backward()


def checkpointed(model: nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": True})
    added(model)


def of_the_backbone(model: nn.Module) -> None:
    """A loss of what the model inside gives, without a call of the model itself."""
    hidden = model.model(input_ids=tokens(0)).last_hidden_state
    (hidden.square().mean() + penalty(model)).backward()


def read_by_others(model: nn.Module) -> None:
    """The weights of the norms are also read in the forward of the layers before them."""
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in ("q", "k"):
            column = attention.get_submodule(f"{name}_proj")
            norm = attention.get_submodule(f"{name}_norm")
            column.register_forward_hook(functools.partial(_scaled_by_weight, norm))
    added(model)


def _scaled_by_weight(norm: Any, column: nn.Module, args: Any, y: Tensor) -> Tensor:
    del column, args
    return (y.unflatten(-1, (-1, len(norm.weight))) * norm.weight).flatten(-2)


def read_by_others_in_the_backbone(model: nn.Module) -> None:
    """The same without a call of the model itself, as TRL calls what is inside of it."""
    read_by_others(model)
    hidden = model.model(input_ids=tokens(0)).last_hidden_state
    loss_of(lambda **_: SimpleNamespace(logits=model.lm_head(hidden)), tokens(0)).backward()


def hooked_by_accelerate(model: nn.Module) -> None:
    """Its hooks replace the forward of each module; the penalty reads attributes of modules."""
    for module in model.modules():
        add_hook_to_module(module, ModelHook(), append=True)
    norms = [each for each in model.modules() if type(each).__name__.endswith("Qwen3RMSNorm")]
    assert norms and all(isinstance(norm.weight, nn.Parameter) for norm in norms)
    squares = torch.stack([norm.weight.square().sum() for norm in norms])
    (loss_of(model, tokens(0)) + squares.sum()).backward()


def replaced_forward(model: nn.Module) -> None:
    """As kernels for a family replace the forward of its norms."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("Qwen3RMSNorm"):
            vars(module)["forward"] = MethodType(forward, module)
    hidden = model.model(input_ids=tokens(0)).last_hidden_state
    (hidden.square().mean() + penalty(model)).backward()


def by_copies(model: nn.Module) -> None:
    """A step of MAML of the first order: gradients of copies, after a step of these."""
    names = dict(model.named_parameters())
    copies = {name: p.detach().clone().requires_grad_() for name, p in names.items()}

    def loss(parameters: dict[str, Tensor], step: int) -> Tensor:
        ids = tokens(step)
        logits = functional_call(model, parameters, kwargs={"input_ids": ids}).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    inner = torch.autograd.grad(loss(copies, 0), list(copies.values()))
    moved = {
        name: (p - RATE * gradient).detach().requires_grad_()
        for (name, p), gradient in zip(copies.items(), inner, strict=True)
    }
    outer = torch.autograd.grad(loss(moved, 1), list(moved.values()))
    for parameter, gradient in zip(names.values(), outer, strict=True):
        parameter.grad = gradient


def of_a_copy(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    added(twin)
    for parameter, own in zip(model.parameters(), twin.parameters(), strict=True):
        parameter.grad = own.grad


def compiled(model: nn.Module) -> None:
    model.compile(backend="aot_eager")
    added(model)


def unfrozen(model: nn.Module) -> None:
    model.requires_grad_(True)
    added(model)


WAYS: dict[str, Callable[[nn.Module], None]] = {
    each.__name__: each
    for each in (
        *(added, apart, checkpointed, of_the_backbone, read_by_others, replaced_forward),
        *(read_by_others_in_the_backbone, hooked_by_accelerate),
        *(by_copies, of_a_copy, compiled, unfrozen),
    )
}


def make(family: str, changes: dict[str, Any]) -> nn.Module:
    model = build(family, tied=False, **changes).double()
    model.config.use_cache = False
    return model


def gradients(
    way: str, family: str, changes: dict[str, Any], options: dict[str, Any]
) -> dict[str, float]:
    """How far each gradient is from that of one process, relative to its largest element."""
    full, model = make(family, changes), make(family, changes)
    model.requires_grad_(way != "unfrozen")
    model = deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=options)
    WAYS[way](full)
    WAYS[way](model)
    found = gathered_gradients(model)
    expected = {name: p.grad for name, p in full.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    return {name: distance(found[name], gradient) for name, gradient in expected.items()}


def second_derivatives() -> list[Tensor]:
    """Of a penalty on what the ranks have in common: there is no sum in it."""
    model = make("qwen3", {"num_key_value_heads": 1})
    model = deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    norm = model.model.layers[0].self_attn.q_norm.weight
    (first,) = torch.autograd.grad(norm.pow(3).sum(), norm, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), norm)
    return [second, 6 * norm.detach()]


def parametrized() -> str:
    """A norm of queries that is parametrized after the model was sharded."""
    model = make("qwen3", {})
    model = deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    norm = model.model.layers[0].self_attn.q_norm
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    return raised_error(lambda: model(input_ids=tokens(0)))
