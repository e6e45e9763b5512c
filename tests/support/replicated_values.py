# SPDX-License-Identifier: Apache-2.0
"""What several ranks of a TP group hold of a training run, compared bit by bit."""

import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

import deepspeed_autotp

STATES = ("exp_avg", "exp_avg_sq")


def differing_values(model: object, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of all that several ranks hold and that differs: parameters, their copies in
    float32 and the states of AdamW. ``model`` is sharded over all ranks, or an engine of such a
    model."""
    local = {key: _digest(value) for key, value in _held_by_several(model, optimizer)}
    found: list[dict[tuple[object, ...], str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, local)
    seen: dict[tuple[object, ...], set[str]] = {}
    for digests in found:
        for key, digest in digests.items():
            seen.setdefault(key, set()).add(digest)
    assert any(key[-1] == "exp_avg_sq" for key in seen)  # it has stepped, and was looked at
    return sorted({f"{name} {what}" for (name, *_, what), each in seen.items() if len(each) > 1})


def _held_by_several(
    model: object, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[tuple[object, ...], Tensor]]:
    """By name, owner, place and kind of value: the values of this rank that others have, too."""
    state = deepspeed_autotp.tensor_parallel(model)
    for entry, parameter in zip(state.plan.entries, state.parameters, strict=True):
        shared = entry.shared(state.group.rank)
        if entry.is_tied or (entry.is_sharded and not shared):
            continue
        for what, value in _values(model, parameter, optimizer):
            if not entry.is_sharded:
                yield (entry.name, 0, 0, what), value
            for place, (offset, length, owner, _) in enumerate(shared):
                run = value.view(parameter.shape).narrow(entry.dim, offset, length)
                yield (entry.name, owner, place, what), run


def _values(
    model: object, parameter: Tensor, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    yield "parameter", parameter.detach()
    if not isinstance(model, DeepSpeedEngine):
        yield from ((name, optimizer.state[parameter][name]) for name in STATES)
        return
    kept = {"float32": safe_get_full_fp32_param(parameter)}
    kept |= {name: safe_get_full_optimizer_state(parameter, name) for name in STATES}
    yield from ((name, value) for name, value in kept.items() if value is not None)


def _digest(value: Tensor) -> str:
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()
