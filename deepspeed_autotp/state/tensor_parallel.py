# SPDX-License-Identifier: Apache-2.0
"""A model that is sharded: its plan, its group, and its weights whole again.

Reads the plan's entries and moves tensors accordingly; decides nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp import interop
from deepspeed_autotp._core import Entry, Plan
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.distributed.transport import Carrier, Kind
from deepspeed_autotp.native import packing
from deepspeed_autotp.state.grad_sync import hook_gradients

_KEY = "tensor_parallel"


def cut(full: Tensor, *, entry: Entry, rank: int) -> Tensor:
    """The shard of ``full`` that ``rank`` holds, as a tensor of its own."""
    return packing.pack(full, view=entry.view, runs=entry.runs(rank), shape=entry.local_shape(rank))


def kind_of(tensor: Tensor, entry: Entry, ranks: int) -> Kind:
    """The shards of ``entry`` in the data type of ``tensor``."""
    sizes = [math.prod(entry.local_shape(rank)) * tensor.itemsize for rank in range(ranks)]
    return Kind(f"{entry.name} ({tensor.dtype})", tuple(sizes))


class TensorParallel:
    """What a sharded model carries; found again with :func:`tensor_parallel`.

    ``parameters[i]`` is the tensor of ``plan.entries[i]``; sharding keeps its identity.
    """

    def __init__(self, *, plan: Plan, group: TPGroup, parameters: tuple[nn.Parameter, ...]) -> None:
        self.plan = plan
        self.group = group
        self.parameters = parameters
        self._index = {id(p): i for i, p in reversed(list(enumerate(parameters)))}
        self._shards: dict[int, tuple[Tensor, int]] = {}

    @property
    def place(self) -> torch.device:
        """Where the shards lie."""
        return self.parameters[0].device

    def entry(self, parameter: Tensor) -> Entry | None:
        """The plan's entry of ``parameter``, or None for a tensor the plan does not know."""
        found = self._index.get(id(parameter))
        return None if found is None else self.plan.entries[found]

    def check_identity(self, model: nn.Module) -> None:
        """ValueError when a parameter of ``model`` is no longer the one that was sharded."""
        known = {e.name: p for e, p in zip(self.plan.entries, self.parameters, strict=True)}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if known.get(name, parameter) is not parameter:
                raise ValueError(
                    f"{name} was replaced after the model was sharded, so its part of the whole is "
                    "not known any more; load weights with load_state_dict(assign=False)"
                )

    def counts_in_norm(self, index: int) -> bool:
        """Whether this rank counts parameter ``index`` in the gradient norm.

        A shard counts where it lies; what several ranks hold counts on the first of them, and
        what all hold on none here, because DeepSpeed counts the first rank's anyway.
        """
        return self.plan.entries[index].is_counted(self.group.rank)

    def owned_square(self, gradient: Tensor, *, entry: Entry | None) -> Tensor:
        """Sum of squares of what this rank is the first to hold of a gradient.

        In float32, or in float64 where the gradient is. A tensor without an entry is whole.
        """
        rank = self.group.rank
        square = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square()
        if entry is None or not entry.is_sharded:
            return square.sum() * (rank == 0)
        for offset, length, owner, _ in entry.shared(rank):
            if owner != rank:
                square.narrow(entry.dim, offset, length).zero_()
        return square.sum()

    def gather(self, shard: Tensor, *, entry: Entry) -> Tensor:
        """The full tensor on every rank. Every rank calls it, in the same order."""
        ranks = range(self.group.size)
        parts = self.group.all_gather(shard.detach(), [entry.local_shape(r) for r in ranks])
        return _joined(parts, entry)

    def gather_to_host(
        self, shard: Tensor, *, entry: Entry, parts: Carrier, everywhere: bool
    ) -> Tensor | None:
        """The full tensor on a host: of every rank, or of the first, and then None elsewhere.

        All ranks call it, as ``gather``. What it takes where a contiguous shard lies does not grow
        with it.
        """
        shard, kind = shard.detach(), kind_of(shard, entry, self.group.size)
        if self.group.rank and not everywhere:
            parts.gather(shard, None, kind)
            return None
        shapes = [entry.local_shape(rank) for rank in range(self.group.size)]
        into = [torch.empty(shape, dtype=shard.dtype, device="cpu") for shape in shapes]
        if everywhere:
            parts.gather_to_all(shard, into, kind)
        else:
            parts.gather(shard, into, kind)
        return _joined(into, entry)

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorParallel:
        """The state of a copy of the model: its parameters, their gradients summed as here."""
        parameters = tuple(copy.deepcopy(parameter, memo) for parameter in self.parameters)
        hook_gradients(self.plan, parameters, self.group)
        return TensorParallel(plan=self.plan, group=self.group, parameters=parameters)

    # DeepSpeed's protocol: it gathers and cuts the parameters of one module at a time.

    @torch.no_grad()
    def gather_params(self, params_list: list[Tensor | None]) -> None:
        """Make every cut parameter of the list whole, in place."""
        for parameter, entry in self._cut_entries(params_list):
            shard, depth = self._shards.get(id(parameter), (parameter.data, 0))
            self._shards[id(parameter)] = shard, depth + 1
            if depth == 0:
                parameter.data = self.gather(parameter, entry=entry)

    @torch.no_grad()
    def _tp_partition(self, params_list: list[Tensor | None]) -> None:
        """Cut what ``gather_params`` made whole, into the memory where the shards were.

        The optimizer may own that memory: ZeRO updates one flat buffer for many weights.
        """
        for parameter, entry in self._cut_entries(params_list):
            shard, depth = self._shards.pop(id(parameter))
            if depth > 1:
                self._shards[id(parameter)] = shard, depth - 1
                continue
            shard.copy_(cut(parameter.detach(), entry=entry, rank=self.group.rank))
            parameter.data = shard

    def _cut_entries(self, params_list: list[Tensor | None]) -> Iterator[tuple[Tensor, Entry]]:
        for parameter in params_list:
            entry = None if parameter is None else self.entry(parameter)
            if parameter is not None and entry is not None and entry.is_sharded:
                yield parameter, entry


def _joined(parts: Sequence[Tensor], entry: Entry) -> Tensor:
    """The full tensor whose shards, by rank, are ``parts``."""
    full = parts[0].new_empty(entry.shape)
    for rank, part in enumerate(parts):
        packing.unpack_(full, part, view=entry.view, runs=entry.runs(rank))
    return full


def attach(model: nn.Module, state: TensorParallel) -> None:
    """Make ``model`` carry ``state``."""
    model.__dict__[_KEY] = state


def tensor_parallel(model: nn.Module) -> TensorParallel:
    """The state of a sharded model, or of the one inside an engine or wrapper.

    ValueError when nothing in ``model`` is sharded.
    """
    found = find_tensor_parallel(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} is not sharded: pass it to deepspeed_autotp.initialize or "
            "deepspeed_autotp.parallelize first"
        )
    return found


def find_tensor_parallel(model: nn.Module) -> TensorParallel | None:
    """As :func:`tensor_parallel`, with None instead of the error."""
    for inner in interop.unwrapped(model):
        found = inner.__dict__.get(_KEY)
        if isinstance(found, TensorParallel):
            return found
    return None


def without_wrappers(model: nn.Module) -> nn.Module:
    """What is sharded inside of an engine or wrapper; the innermost where nothing of them is."""
    inner = model
    for inner in interop.unwrapped(model):
        if _KEY in inner.__dict__:
            break
    return inner


def find_part(model: nn.Module) -> TensorParallel | None:
    """As :func:`find_tensor_parallel`, also where a part of ``model`` is sharded.

    What is around that part is whole on every rank. ValueError for several parts.
    """
    found = (find_tensor_parallel(module) for module in model.modules())
    states = {id(state): state for state in found if state is not None}
    if len(states) > 1:
        raise ValueError(
            f"{len(states)} parts of {type(model).__name__} are sharded, each on its own; call "
            "this for one part after the other"
        )
    return next(iter(states.values()), None)
