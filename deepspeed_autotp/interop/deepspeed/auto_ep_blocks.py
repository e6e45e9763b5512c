# SPDX-License-Identifier: Apache-2.0
"""Whether AutoEP computes what the blocks of a model do, tried before it replaces them.

Its presets and options say how a router scores and selects experts, and which function an expert
is. Where that is not what the model does, the block would train as another one without any error.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp.interop.deepspeed.parameters import full_shape
from deepspeed_autotp.interop.versions import required

_required = functools.partial(required, project="deepspeed", needed_for="expert_parallel")

_TOKENS = 64
# Of most tokens, relative to the output. Routers that work in other dtypes select other experts for
# a few tokens whose scores are nearly alike.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
_ROUNDED = 0.05

_OWN_KEYS = (
    "leave out preset_model, or name the one of this model, and leave out the keys of "
    "expert_parallel that choose how experts are selected or what they compute"
)


def refuse_unlike_blocks(model: nn.Module, specs: Sequence[Any], asked: Any) -> None:
    """ValueError where AutoEP makes something else of a block. ``specs`` are what it found in
    ``model`` by its configuration ``asked``; blocks of one kind are tried once."""
    noise = getattr(getattr(model, "config", None), "router_jitter_noise", None)
    if noise:
        raise ValueError(
            f"got a model with router_jitter_noise {noise}, which AutoEP leaves out, expected 0"
        )
    tried: list[Any] = []
    for spec in specs:
        kind = dataclasses.replace(spec, moe_module_name="")
        block = model.get_submodule(spec.moe_module_name)
        if kind in tried or not all(map(_is_whole, block.parameters())):
            continue
        tried.append(kind)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            _try(block, spec, asked)


def _is_whole(parameter: Tensor) -> bool:
    return not parameter.is_meta and tuple(parameter.shape) == tuple(full_shape(parameter))


def _try(block: Any, spec: Any, asked: Any) -> None:
    """Compare the output of ``block`` with that of AutoEP's router and block around the experts of
    transformers, and one expert with AutoEP's: a block has memory for no second set of experts."""
    maker = _required(
        importlib.import_module("deepspeed.module_inject.auto_ep_layer"), "AutoEPMoELayer"
    )
    layer = maker(
        spec=spec, source_module=block, ep_size=spec.num_experts, ep_rank=0, config=asked
    ).train(block.training)
    experts, gate = block.get_submodule(spec.experts_name), layer.router.gate
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, spec.hidden_size, generator=generator).to(gate.weight)
    x = x * (2 / gate(x).float().std().clamp(min=1e-6)).to(x.dtype)  # scores that are not alike
    scores, chosen, _ = layer.router(x)
    routed = experts(x, chosen, scores.to(x.dtype)).reshape(1, *x.shape)
    found = layer._finalize_output(routed, x, x[None], spec.hidden_size)
    what = f"'{spec.moe_module_name}' with preset '{spec.model_family}'"
    if _differ(_first(found), _first(block(x[None]))):
        raise ValueError(
            f"got {what}, of which AutoEP would select, weight or sum up the experts otherwise "
            f"than the model does, expected the same output; {_OWN_KEYS}"
        )
    ones = scores.new_ones(_TOKENS, 1).to(x.dtype)
    counts = torch.tensor([_TOKENS], dtype=torch.int32, device=x.device)
    if _differ(layer.experts(x, counts), experts(x, chosen.new_zeros(_TOKENS, 1), ones)):
        raise ValueError(
            f"got {what}, of which AutoEP's experts compute another function of a token than "
            f"the model's, expected the same output; {_OWN_KEYS}"
        )


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _differ(found: Tensor, expected: Tensor) -> bool:
    """Whether most tokens have another output."""
    rows, wanted = (t.float().reshape(_TOKENS, -1) for t in (found, expected))
    scale = wanted.norm(dim=1).clamp(min=1e-20)
    error = ((rows - wanted).norm(dim=1) / scale).median()
    return not bool(error <= _TOLERANCE.get(expected.dtype, _ROUNDED))
