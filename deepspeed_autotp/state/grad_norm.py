# SPDX-License-Identifier: Apache-2.0
"""The gradient norm of a sharded model: each weight counts once however many ranks hold it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed_autotp._core import Entry
from deepspeed_autotp.interop.deepspeed.auto_ep import expert_group, is_expert
from deepspeed_autotp.interop.fully_shard import (
    is_distributed,
    local_part,
    local_window,
    over_parts,
    same_parts,
)
from deepspeed_autotp.state.fully_shard import follow_fully_shard
from deepspeed_autotp.state.sharded_model import (
    TensorParallel,
    container_of,
    find_nested_tensor_parallel,
    owner_of,
)


class GradNorm:
    """The norm of one sharded model's gradients, and what of it this rank counts.

    A parameter that was added after the model was sharded counts as replicated.
    """

    def __init__(self, state: TensorParallel) -> None:
        self._state = state

    def counted(self, gradient: Tensor, parameter: Tensor, *, first: int = 0) -> Tensor:
        """A gradient with zeros in the runs that a lower rank holds, too.

        ``gradient`` has the elements of this rank's shard of ``parameter`` in order, or those from
        ``first`` on, as ZeRO partitions it; zeros may follow them. Or it is a DTensor: the result
        is of its local part.
        """
        entry, rank = self._state.entry(parameter), self._state.group.rank
        if is_distributed(gradient):
            return _counted_part(gradient, entry, rank)
        if is_expert(parameter):
            return gradient
        if entry is None or not entry.is_sharded:
            return gradient if rank == 0 else gradient.new_zeros(0)
        others = [(offset, n) for offset, n, owner, _ in entry.shared(rank) if owner != rank]
        if not others:
            return gradient
        drop = torch.zeros(entry.local_shape(rank), dtype=torch.bool, device=gradient.device)
        for offset, length in others:
            drop.narrow(entry.dim, offset, length).fill_(True)
        drop = drop.view(-1)[first : first + gradient.numel()]
        kept = gradient.flatten().clone()
        kept[: drop.numel()].masked_fill_(drop, 0)
        return kept

    def is_partly_counted(self, parameter: Tensor) -> bool:
        """Whether some rank counts only some runs of its shard, as of fused weights with few
        key/value heads."""
        entry = self._state.entry(parameter)
        ranks = range(self._ranks)
        return entry is not None and any(_counts_some_runs(entry, rank) for rank in ranks)

    def of(self, pairs: Iterable[tuple[Tensor, Tensor]], *, order: float = 2.0) -> Tensor:
        """The norm of the unsharded model, in float64; ``pairs`` are parameters with gradients.

        All ranks of the TP group call it. Powers are formed in float32, or in float64 where the
        gradient is. ``order`` is a positive number; infinity is the largest absolute value.
        """
        # By where fully_shard has their parts, in the order of the parameters on all ranks.
        found: dict[object, tuple[Tensor, Tensor]] = {}
        experts: dict[dist.ProcessGroup, Tensor] = {}
        for parameter, gradient in pairs:
            if is_expert(parameter):  # this rank has some of them for itself
                power = _power(gradient.to(_power_dtype(gradient)), order)
                handle = expert_group(parameter)
                experts[handle] = _added(experts.get(handle, self._zero()), power, order)
                continue
            counted = self.counted(gradient, parameter).to(_power_dtype(gradient))
            before = found.get(same_parts(gradient), (gradient, self._zero()))[1]
            found[same_parts(gradient)] = gradient, _added(before, _power(counted, order), order)
        total = self._zero()
        for gradient, powers in found.values():
            total = _added(total, over_parts(powers, gradient, largest=math.isinf(order)), order)
        if math.isinf(order):
            total = torch.stack(self._state.group.all_gather(total, [()] * self._ranks)).amax()
        else:
            total = self._state.group.all_reduce(total)
        for handle, powers in experts.items():
            dist.all_reduce(powers, _reduction(order), group=handle)
            total = _added(total, powers, order)
        if math.isinf(order):
            return total
        return total.sqrt() if order == 2.0 else total.pow(1.0 / order)

    @property
    def _ranks(self) -> int:
        return self._state.group.size

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self._state.device)


@torch.no_grad()
def clip_grad_norm_(
    model_or_parameters: nn.Module | Tensor | Iterable[Tensor], max_norm: float
) -> Tensor:
    """Scale the gradients so that their Euclidean norm is at most ``max_norm``.

    model_or_parameters  a sharded model; or parameters of one, as torch's function takes: the norm
                         is of these, and only these are scaled

    Returns the norm before, in float32, or in float64 where a gradient is: that of the unsharded
    model, each weight counted once however many ranks hold it. Parameters added after the model
    was sharded count as replicated. All ranks of the TP group call it. An unsharded model is
    clipped as torch does. ValueError for parameters of several sharded models.
    """
    parameters: list[Tensor]
    if isinstance(model_or_parameters, nn.Module):
        parameters = list(model_or_parameters.parameters())
        state = find_nested_tensor_parallel(model_or_parameters)
        root: nn.Module | None = model_or_parameters
    else:
        given = model_or_parameters
        parameters = [given] if isinstance(given, Tensor) else list(given)
        state = container_of(parameters)
        root = None if state is None else state.root  # a copy has none
    if state is None:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    if root is not None:
        follow_fully_shard(root, state)
        state.check_identity(root)
    if any(owner_of(parameter) not in (None, state) for parameter in parameters):
        raise ValueError(
            "clip_grad_norm_: got parameters of several sharded models, expected those of one; "
            "call it for each of them"
        )
    pairs = [(p, p.grad) for p in parameters if p.grad is not None]
    dtype = torch.float32
    for _, gradient in pairs:
        dtype = torch.promote_types(dtype, gradient.dtype)
    norm = GradNorm(state).of(pairs).to(dtype)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for _, gradient in pairs:
        local_part(gradient).mul_(scale.to(gradient.device))
    return norm


def _counted_part(gradient: Tensor, entry: Entry | None, rank: int) -> Tensor:
    """What ``rank`` counts of the local part of a DTensor."""
    part = local_part(gradient)
    if entry is None or not entry.is_sharded:
        return part if rank == 0 else part.new_zeros(0)
    offsets, sizes = local_window(gradient)
    begin = offsets[entry.dim]
    chunks = entry.chunks(rank, begin, begin + sizes[entry.dim])
    own = [part.narrow(entry.dim, at - begin, n) for at, _, n, is_owned in chunks if is_owned]
    return torch.cat([each.flatten() for each in own]) if own else part.new_zeros(0)


def _power_dtype(gradient: Tensor) -> torch.dtype:
    return torch.promote_types(gradient.dtype, torch.float32)


def _power(counted: Tensor, order: float) -> Tensor:
    """What a part of the gradients adds to the norm of an order, before the root."""
    if math.isinf(order):
        return counted.abs().amax() if counted.numel() else counted.new_zeros(())
    return counted.square().sum() if order == 2.0 else counted.abs().pow(order).sum()


def _added(total: Tensor, power: Tensor, order: float) -> Tensor:
    return torch.maximum(total, power.to(total)) if math.isinf(order) else total + power


def _reduction(order: float) -> dist.ReduceOp.RedOpType:
    return dist.ReduceOp.MAX if math.isinf(order) else dist.ReduceOp.SUM


def _counts_some_runs(entry: Entry, rank: int) -> bool:
    shared = any(owner != rank for _, _, owner, _ in entry.shared(rank))
    return shared and entry.is_counted(rank)
