# SPDX-License-Identifier: Apache-2.0
"""The states that DeepSpeed would have saved had the run been of another size.

They are made in memory for one rank at a time, as its files would hold them, so that DeepSpeed's
own loading fills weights, optimizer, schedule and counters from them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeed_autotp.checkpoint.disk_memory import Empty, memory
from deepspeed_autotp.checkpoint.layout import Layout, resharded
from deepspeed_autotp.checkpoint.resharded_units import (
    group_settings,
    new_units,
    refuse_other_orders,
)
from deepspeed_autotp.checkpoint.saved_checkpoint import (
    MASTER,
    SavedCheckpoint,
    refuse_undescribed,
    units_of,
)
from deepspeed_autotp.checkpoint.zero_partition import Partition, own_share

# What a file with weights has of them, and of the optimizer; all else is copied.
_LARGE = frozenset({"module", "optimizer"})
_FROZEN = "frozen_param_fragments"
_DIMENSIONS = "checkpoint_parallel_dimensions"

Unit = tuple[tuple[str, ...], list[Partition]]


class ReshardedStates:
    """The states of ``saved`` for ``layout`` and ``replicas`` data-parallel ranks.

    ``sub_group_size`` is the most that ZeRO 3 has in a sub-group; ``empty`` gives what is made its
    memory. ValueError where the checkpoint cannot be resharded; nothing but its headers is read for
    that.
    """

    def __init__(
        self,
        saved: SavedCheckpoint,
        layout: Layout,
        *,
        replicas: int,
        sub_group_size: int,
        universal_info: Mapping[str, Any] | None = None,
        empty: Empty = memory,
    ) -> None:
        self._saved = saved
        self._layout = layout
        self._replicas = replicas
        self._universal_info = universal_info
        self._empty = empty
        where = f"the checkpoint {str(saved.files.folder)!r}"
        difference = saved.layout.difference(layout)
        if difference is not None:
            raise ValueError(f"{where} is of another model: {difference}; load it into the model "
                             "that it was saved from")  # fmt: skip
        if saved.groups is None:
            raise ValueError(
                f"{where} does not say which parameters its optimizer has; load it at the sizes "
                "it was saved at"
            )
        self._param_groups = group_settings(saved)
        refuse_other_orders(saved)
        self.groups = new_units(
            saved, layout, self._param_groups, replicas=replicas, sub_group_size=sub_group_size
        )

    def param_shapes(self, rank: int) -> list[OrderedDict[str, torch.Size]]:
        """The shapes of the shards on TP rank ``rank`` by unit, as DeepSpeed notes them."""
        parameters = self._layout.parameters
        return [
            OrderedDict((name, torch.Size(parameters[name].local_shape(rank))) for name in group)
            for group in self.groups
        ]

    def model(self, rank: int, replica: int, *, with_states: bool = True) -> dict[str, Any]:
        """What the file with the weights of a rank would hold; without ZeRO the states of the
        optimizer are in it, unless they are not asked for."""
        kind = self._saved.kind
        saved = self._saved.files.model(0)
        states = {k: _owned(v) for k, v in saved.items() if k not in _LARGE | {_FROZEN}}
        states[_FROZEN] = None
        states["module"] = self._module(saved["module"], rank)
        states["optimizer"] = None
        states["dp_world_size"] = self._replicas
        states["mp_world_size"] = self._layout.ranks
        if _DIMENSIONS in states:
            states[_DIMENSIONS] = {**states[_DIMENSIONS], "tp_degree": self._layout.ranks}
        states.pop("universal_checkpoint_info", None)
        if self._universal_info is not None:
            states["universal_checkpoint_info"] = self._universal_info
        if rank or replica:  # DeepSpeed notes them on global rank 0 alone
            states["shared_params"] = _emptied(states.get("shared_params"))
        if kind.is_partitioned:
            states["param_shapes"] = self.param_shapes(rank)
            self._add_frozen(states, rank, replica)
        elif with_states:
            states["optimizer"] = self.optimizer(rank, replica)
        return states

    def optimizer(self, rank: int, replica: int) -> dict[str, Any]:
        """What DeepSpeed's optimizer would have for a rank."""
        saved, kind = self._saved, self._saved.kind
        units = units_of(kind, self.groups, self._layout, rank=rank, replicas=self._replicas)
        states = [self._state(unit, rank, replica) for unit in units]
        masters = [state.pop(MASTER, None) for state in states]
        base = {
            "state": {index: state for index, state in enumerate(states) if state},
            "param_groups": self._param_groups,
        }
        if kind.name == "torch":
            return base
        made = dict(saved.optimizer(0, 0))
        made[kind.base] = base
        if kind.name == "16 bits":
            iterator = iter(masters)
            made["fp32_groups"] = [[next(iterator) for _ in group] for group in self.groups]
            return made
        made[kind.masters] = masters
        made["partition_count"] = (
            self._replicas if kind.is_stage3 else [self._replicas] * len(units)
        )
        made.pop("universal_checkpoint_info", None)
        if not kind.is_stage3:
            partitions = [unit[1][replica] for unit in units]
            self._add_flat(made, masters, partitions)
        return made

    def _add_flat(
        self, made: dict[str, Any], masters: list[Any], partitions: Sequence[Partition]
    ) -> None:
        """What ZeRO 1 and 2 note of the flat groups."""
        made["group_paddings"] = [partition.padding for partition in partitions]
        address = _address_type(self._saved)
        made["param_slice_mappings"] = [
            OrderedDict((x.name, address(numel=x.numel, start=x.start)) for x in p.pieces)
            for p in partitions
        ]
        if self._saved.kind.name == "zero":  # which keeps the padding to itself
            made[self._saved.kind.masters] = [
                master[: p.size - p.padding] for master, p in zip(masters, partitions, strict=True)
            ]

    def _module(self, module: dict[str, Any], rank: int) -> dict[str, Any]:
        """The weights and buffers of a TP rank."""
        refuse_undescribed(self._saved, module)
        made: dict[str, Any] = type(module)()
        for name, value in module.items():
            new = self._layout.parameters.get(name)
            if new is None or self._saved.kind.is_stage3:
                made[name] = value
                continue
            known = new.tied_to or name
            if known in made and known != name:
                made[name] = made[known]
                continue
            made[name] = resharded(
                self._saved.weight_shards(name),
                old=self._saved.parameter(name),
                new=new,
                rank=rank,
                empty=self._empty,
            )
        return made

    def _add_frozen(self, states: dict[str, Any], rank: int, replica: int) -> None:
        """The weights that do not train, which ZeRO 2 and 3 keep apart."""
        shapes = states.get("frozen_param_shapes")
        if not shapes:
            states[_FROZEN] = shapes
            return
        parameters = self._layout.parameters
        states["frozen_param_shapes"] = OrderedDict(
            (name, torch.Size(parameters[name].local_shape(rank))) for name in shapes
        )
        fragments = OrderedDict[str, Tensor]()
        for name in shapes:
            if not self._saved.kind.is_stage3:
                fragments[name] = states["module"][name]
                continue
            old = self._saved.parameter(name)
            weight = resharded(
                [_shaped(get, old.local_shape(r)) for r, get in
                 enumerate(self._saved.weight_shards(name))],
                old=old, new=parameters[name], rank=rank,
            ).reshape(-1)  # fmt: skip
            part = own_share(weight.numel(), self._replicas)
            own = weight[part * replica : part * (replica + 1)]
            fragments[name] = self._empty((part,), weight.dtype).zero_()
            fragments[name][: own.numel()] = own
        states[_FROZEN] = fragments

    def _state(self, unit: Unit, rank: int, replica: int) -> dict[str, Any]:
        """The state of a unit on a rank; ``fp32`` is its float32 weight."""
        names, partitions = unit
        saved = self._saved
        partition = partitions[replica if saved.kind.is_partitioned else 0]
        example_unit = saved.unit_of(names[0])
        example = saved.state(example_unit, 0, 0)
        old = saved.units(0)[example_unit][1][0]
        is_scalar = not saved.kind.is_partitioned and saved.parameter(names[0]).shape == ()
        made: dict[str, Any] = {}
        for key, value in example.items():
            if not isinstance(value, Tensor) or (value.dim() == 0 and not is_scalar):
                made[key] = _owned(value)
                continue
            if value.numel() not in (old.size, old.size - old.padding):
                raise ValueError(
                    f"the state {key!r} of {names[0]!r} has {value.numel()} elements, expected "
                    f"{old.size} as the weight; such an optimizer cannot be resharded: load the "
                    "checkpoint at the sizes it was saved at"
                )
            made[key] = self._empty((partition.size,), value.dtype).zero_()
            for piece in partition.pieces:
                shard = self._shard(piece.name, key, rank)
                made[key][piece.start : piece.start + piece.numel] = shard[
                    piece.begin : piece.begin + piece.numel
                ]
            if not saved.kind.is_partitioned:
                made[key] = made[key].reshape(self._layout.parameters[names[0]].local_shape(rank))
        return made

    def _shard(self, name: str, key: str, rank: int) -> Tensor:
        old = self._saved.parameter(name)
        return resharded(
            self._saved.state_shards(name, key), old=old,
            new=self._layout.parameters[name], rank=rank,
        ).reshape(-1)  # fmt: skip


def _owned(value: Any) -> Any:
    """A copy of small values: what is mapped into memory lasts only as long as its file."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return type(value)((key, _owned(each)) for key, each in value.items())
    if type(value) in (list, tuple):
        return type(value)(_owned(each) for each in value)
    return value


def _emptied(value: Any) -> Any:
    return {} if isinstance(value, dict) else value


def _shaped(get: Callable[[], Tensor], shape: Sequence[int]) -> Callable[[], Tensor]:
    return lambda: get().reshape(*shape)


def _address_type(saved: SavedCheckpoint) -> Callable[..., Any]:
    """DeepSpeed's type of the place of a parameter in a flat group, from the file itself."""
    for group in saved.optimizer(0, 0)["param_slice_mappings"]:
        for address in group.values():
            return type(address)
    raise AssertionError("a partition without a parameter")
