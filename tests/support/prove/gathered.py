# SPDX-License-Identifier: Apache-2.0
"""Full gradients, and full masks of dropout, of a sharded model."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import deepspeed_autotp
from tests.support.prove.case import Case
from tests.support.prove.norms import Dropout
from tests.support.prove.training import Gradients

Masks = dict[str, list[Tensor]]


def gradients(model: nn.Module, *, of_engine: bool = False) -> Gradients:
    """The full gradients, on every rank; ``of_engine``: they are where its optimizer keeps them."""
    from deepspeed.utils import safe_get_full_grad

    state = deepspeed_autotp.tensor_parallel(model)
    entries = {entry.name: entry for entry in state.plan.entries}
    found = {}
    for name, parameter in model.named_parameters():
        grad = safe_get_full_grad(parameter) if of_engine else parameter.grad
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        if not parameter.requires_grad or grad is None:
            continue
        entry = entries.get(name)
        is_full = entry is None or entry.dim < 0
        found[name] = grad.clone() if is_full else state.gather(grad, entry=entry)
    return found


def take_masks(model: nn.Module) -> Masks:
    """The masks of all dropouts since the last call."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            found[name] = list(module.seen)
            module.seen.clear()
    return found


def full_masks(case: Case, model: nn.Module, own: list[Masks]) -> list[Mapping[str, list[Tensor]]]:
    """The masks of one process, from those of all ranks; of a recomputation there are two."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    dropouts = {n: m for n, m in model.named_modules() if isinstance(m, Dropout)}
    rows = case.rows // case.accumulate
    return [
        {
            name: [
                joined(name, each, [rank[step][name][call] for rank in ranks], rows)
                for call in first_calls(case, len(own[step][name]))
            ]
            for name, each in dropouts.items()
        }
        for step in range(len(own))
    ]


def first_calls(case: Case, calls: int) -> list[int]:
    """Which of the calls of a step are not those of a recomputation."""
    micro = calls // case.accumulate
    first = micro // 2 if case.checkpointing else micro
    return [begin + call for begin in range(0, calls, micro or 1) for call in range(first)]


def joined(name: str, dropout: Dropout, masks: list[Tensor], rows: int) -> Tensor:
    shape = masks[0].shape
    tokens_alone = dropout.dim == 1 and len(shape) == 3 and shape[:2] != (rows, dropout.size)
    if not tokens_alone and masks[0].shape[dropout.dim] == dropout.size:
        assert all(torch.equal(mask, masks[0]) for mask in masks), f"{name} differs over ranks"
        return masks[0]
    full = torch.cat(masks, dropout.dim)
    if not tokens_alone:
        return full
    return full[:, : rows * dropout.size].unflatten(1, (rows, -1)).squeeze(0)  # without padding
