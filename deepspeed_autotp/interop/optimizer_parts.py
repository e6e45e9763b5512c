# SPDX-License-Identifier: Apache-2.0
"""Optimizers of unknown names, tried on a small tensor and on shards of it.

A rank has a shard. An optimizer is right there where shards are updated as the full tensor is, each
in an optimizer of its own.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepspeed_autotp.interop.optimizers import (
    stand_in,
    step_alone,
    wrapped_optimizers,
)
from deepspeed_autotp.interop.rng_states import rng_kept
from deepspeed_autotp.interop.torch_private import without_global_step_hooks

_log = logging.getLogger("deepspeed_autotp")

# Their classes are known, by name where they are refused; those of DeepSpeed and bitsandbytes have
# states outside of Python besides.
_KNOWN = ("torch", "deepspeed", "accelerate", "transformers", "bitsandbytes", "apex")

# Large enough that rows and columns are factored, and many enough that matrices are renewed.
_SHAPE = (256, 128)
_STEPS = 12
_RATE = 0.01
_NEAR = 1e-3

_OWN = ("param_groups", "state")
_NAMED = ("params", "param_names")
_LABELS = ("lr", "initial_lr", "name")
_CHANGING = (dict, list, set)
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def refuse_unlike_on_parts(optimizer: Any, *, before: str) -> None:
    """ValueError where an update of a shard is another one than that of the full tensor; ``before``
    says where the optimizer is from. A warning where it cannot be tried; nothing of it changes."""
    for each in wrapped_optimizers(optimizer):
        if not isinstance(each, Optimizer) or type(each).__module__.split(".")[0] in _KNOWN:
            continue
        name = type(each).__name__
        reason = _untriable(each)
        try:
            with without_global_step_hooks():
                unlike = not reason and any(_is_unlike(each, group) for group in _kinds(each))
        except Exception as error:  # of code that is not ours
            reason, unlike = f"{type(error).__name__}: {error}", False
        if reason:
            _log.warning(
                "%s: %s could not be tried on shards (%s); with tensor parallelism it "
                "trains as one process does only if it works element by element",
                *(before, name, reason),
            )
        if unlike:
            raise ValueError(
                f"{before}: got {name}, which updates a shard otherwise than the full tensor "
                "(by a number over tensors, a product of matrices, or random numbers); on the "
                "shard of a rank it would train another model than one process does. Use an "
                "optimizer that works element by element, such as AdamW, SGD, Adagrad or Lion"
            )


def _untriable(optimizer: Optimizer) -> str:
    """Why a copy of ``optimizer`` could change what is not its own, or nothing."""
    if hasattr(type(optimizer), "__del__"):
        return "it frees something when it is deleted"
    step = vars(optimizer).get("step")
    if step is not None and inspect.unwrap(step) != inspect.unwrap(type(optimizer).step):
        return "its step is not that of its class"
    # A scheduler puts a counter around the step.
    base = vars(Optimizer([nn.Parameter(torch.zeros(1))], {})).keys() | {"step"}
    for key, value in vars(optimizer).items():
        if key not in base and not _is_plain(value):
            return f"its attribute {key} is not made of numbers and texts alone"
    return ""


def _is_plain(value: object) -> bool:
    """Whether a copy of ``value`` shares nothing with it that a step could change."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    plain = int | float | complex | str | bytes | torch.dtype | torch.device
    return value is None or isinstance(value, plain)


def _kinds(optimizer: Optimizer) -> list[Mapping[str, Any]]:
    """One group of parameters of each kind: those with the same options, whatever the rate."""
    kinds: dict[str, Mapping[str, Any]] = {}
    for group in optimizer.param_groups:
        options = {k: v for k, v in group.items() if k not in (*_NAMED, *_LABELS)}
        kinds.setdefault(repr(options), group)
    return list(kinds.values())


def _is_unlike(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a shard is updated in another way; of 1 to 3 dimensions, sharded along each."""
    on = (p.device for p in group["params"] if p.device.type != "meta")
    place = next(on, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    # Rows and columns of other sizes, and gradients that grow.
    sizes = torch.logspace(-2, 0, _SHAPE[0])[:, None] * torch.logspace(0, -1, _SHAPE[1])
    weight = (torch.randn(_SHAPE, generator=draw) * sizes).to(place)
    gradients = [
        (torch.randn(_SHAPE, generator=draw) * sizes.flip(0) * (step + 1)).to(place)
        for step in range(_STEPS)
    ]
    for shape, dims in ((_SHAPE, (0, 1)), ((16, 16, _SHAPE[1]), (0, 1, 2)), ((-1,), (0,))):
        columns = slice(None) if len(shape) > 1 else slice(1)
        whole, *grads = (each[:, columns].reshape(shape) for each in (weight, *gradients))
        moved = _moved(optimizer, group, whole, grads)
        if not moved.isfinite().all():
            raise ArithmeticError("its steps are not finite")
        if not moved.any():
            raise ArithmeticError("its steps move nothing")
        for dim, half in itertools.product(dims, (0, 1)):
            parts = [each.chunk(2, dim)[half] for each in (whole, moved, *grads)]
            own = _moved(optimizer, group, parts[0], parts[2:])
            if float((own - parts[1]).norm()) > _NEAR * float(parts[1].norm()):
                return True
    return False


def _moved(
    optimizer: Optimizer, group: Mapping[str, Any], weight: Tensor, gradients: list[Tensor]
) -> Tensor:
    """How far a copy of ``optimizer`` moves ``weight`` in a step for each of ``gradients``."""
    trained = nn.Parameter(weight.clone())
    own = {k: copy.deepcopy(v) for k, v in group.items() if k not in _NAMED}
    # A scheduler may begin at zero, where nothing would move.
    if isinstance(own.get("lr"), int | float):
        own["lr"] = _RATE
    elif isinstance(own.get("lr"), Tensor):
        own["lr"] = torch.full_like(own["lr"], _RATE)
    scratch = stand_in(optimizer, trained, own)
    for name, value in vars(optimizer).items():
        if name not in (*_OWN, *_HOOKS) and isinstance(value, _CHANGING):
            vars(scratch)[name] = copy.deepcopy(value)
    for name in _HOOKS:  # which a step that calls that of its base class would run
        vars(scratch)[name] = {}
    with rng_kept(weight.device), torch.no_grad():
        for gradient in gradients:
            trained.grad = gradient.clone()
            step_alone(scratch)
    return trained.detach() - weight
