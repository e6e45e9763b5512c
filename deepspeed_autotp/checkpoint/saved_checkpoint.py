# SPDX-License-Identifier: Apache-2.0
"""What the files of a checkpoint of DeepSpeed's engine say of each parameter, without ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from deepspeed_autotp.checkpoint.layout import Layout, SavedParameter
from deepspeed_autotp.checkpoint.rank_files import CheckpointFiles
from deepspeed_autotp.checkpoint.zero_partition import (
    Partition,
    flat_partitions,
    one_parameter,
    own_partitions,
)
from deepspeed_autotp.config.validation import shown
from deepspeed_autotp.interop.bitsandbytes import BESIDE_4BIT

MASTER = "fp32"
_MOST_REPLICAS = 2**20
_WORDS = {
    "torch": "an optimizer in float32 without ZeRO",
    "16 bits": "an optimizer in 16 bits without ZeRO",
    "zero": "ZeRO 1 or 2",
    "bf16": "ZeRO 1 with gradients in float32",
    "zero3": "ZeRO 3",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """The optimizer whose states a checkpoint has: ``name`` is ``torch``, ``16 bits`` (a float32
    copy of each parameter), ``zero`` (1 and 2), ``bf16`` (1 with float32 gradients) or ``zero3``.
    """

    name: str

    @property
    def is_partitioned(self) -> bool:
        """Whether each data-parallel rank has a part of the states, in a file of its own."""
        return self.name in ("zero", "bf16", "zero3")

    @property
    def is_stage3(self) -> bool:
        return self.name == "zero3"

    @property
    def words(self) -> str:
        """For people."""
        return _WORDS.get(self.name, self.name)

    @property
    def base(self) -> str:
        """The key of the states of torch's optimizer; there is none where they are all."""
        return "base_optimizer_state" if self.name in ("zero", "bf16") else "optimizer_state_dict"

    @property
    def masters(self) -> str:
        """The key of the float32 weights, by unit."""
        return "fp32_flat_groups" if self.is_stage3 else "single_partition_of_fp32_groups"


class SavedCheckpoint:
    """What a checkpoint says of each parameter, joined over its data-parallel ranks.

    ``groups`` are the names of the optimizer's parameters by group where the files do not say.
    """

    def __init__(
        self, files: CheckpointFiles, layout: Layout, *, groups: Sequence[Sequence[str]] | None
    ) -> None:
        self.files = files
        self.layout = layout
        model = files.model(0)
        self.replicas = _count(files, model, "dp_world_size")
        self.kind = _kind(files, model)
        if self.kind.is_partitioned:
            groups = [list(shapes) for shapes in model["param_shapes"]]
        self.groups = None if groups is None else tuple(tuple(group) for group in groups)
        self._units: dict[int, list[tuple[tuple[str, ...], list[Partition]]]] = {}
        self._unit_of: dict[str, int] = {}
        self.check_files()

    @cached_property
    def trained(self) -> frozenset[str]:
        """The parameters that the optimizer has."""
        return frozenset(name for group in self.groups or () for name in group)

    def has_master(self, name: str) -> bool:
        """Whether the optimizer has a float32 weight of a parameter."""
        return self.kind.name != "torch" and name in self.trained

    def check_files(self) -> None:
        """ValueError where a file of a rank is missing."""
        # Of more names than there are files one is missing among the first: how many ranks there
        # were is what the files say.
        most = sum(1 for _ in self.files.folder.iterdir()) + 1
        self.files.check_all(list(islice(self._names(), most)))

    def _names(self) -> Iterator[str]:
        """Those of the files of all ranks."""
        has_more = self.files.is_stage3 or self.kind.is_partitioned
        for rank in range(self.layout.ranks):
            for replica in range(self.replicas if has_more else 1):
                if replica == 0 or self.files.is_stage3:
                    yield self.files.model_name(rank, replica)
                if self.kind.is_partitioned:
                    yield self.files.optimizer_name(rank, replica)

    def units(self, rank: int) -> list[tuple[tuple[str, ...], list[Partition]]]:
        """The units of the optimizer of TP rank ``rank``: names, and a partition per replica."""
        if rank not in self._units:
            assert self.groups is not None
            self._units[rank] = units_of(
                self.kind, self.groups, self.layout, rank=rank, replicas=self.replicas
            )
        return self._units[rank]

    def unit_of(self, name: str) -> int:
        """The unit that a parameter of the optimizer is in."""
        if not self._unit_of:
            units = enumerate(self.units(0))
            self._unit_of = {name: unit for unit, (names, _) in units for name in names}
        return self._unit_of[name]

    def state(self, unit: int, rank: int, replica: int) -> Mapping[str, Any]:
        """The optimizer's state of a unit, with the float32 weight as ``fp32``."""
        saved = self.optimizer(rank, replica)
        state = dict(saved.get(self.kind.base, saved)["state"].get(unit, {}))
        if self.kind.name == "16 bits":
            state[MASTER] = [master for group in saved["fp32_groups"] for master in group][unit]
        elif self.kind.is_partitioned:
            state[MASTER] = saved[self.kind.masters][unit]
        return state

    def optimizer(self, rank: int, replica: int) -> dict[str, Any]:
        """The state of the engine's optimizer."""
        if self.kind.is_partitioned:
            return self.files.optimizer(rank, replica)
        saved: dict[str, Any] = self.files.model(rank)["optimizer"]
        return saved

    def weight_shards(self, name: str) -> list[Callable[[], Tensor]]:
        """What gives the weight of each TP rank in the precision of training."""
        return [partial(self._weight, name, rank) for rank in range(self.layout.ranks)]

    def state_shards(self, name: str, key: str) -> list[Callable[[], Tensor]]:
        """What gives the shard of each TP rank of a state of the optimizer, flat."""
        return [partial(self.joined, name, key, rank) for rank in range(self.layout.ranks)]

    def joined(self, name: str, key: str, rank: int) -> Tensor:
        """The shard of TP rank ``rank`` of a state of the optimizer, flat."""
        unit = self.unit_of(name)
        parts = []
        for replica, partition in enumerate(self.units(rank)[unit][1]):
            for piece in partition.pieces:
                if piece.name == name:
                    held = self.state(unit, rank, replica)[key].reshape(-1)
                    parts.append(held.narrow(0, piece.start, piece.numel))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def parameter(self, name: str) -> SavedParameter:
        return self.layout.parameters[name]

    def _weight(self, name: str, rank: int) -> Tensor:
        if not self.files.is_stage3:
            weight: Tensor = self.files.model(rank)["module"][name]
            return weight
        frozen = [
            self.files.model(rank, replica)["frozen_param_fragments"] or {}
            for replica in range(self.replicas)
        ]
        parameter = self.parameter(name)
        known = parameter.tied_to or name
        if known in frozen[0]:
            joined = torch.cat([fragments[known].reshape(-1) for fragments in frozen])
            return joined[: parameter.numel(rank)]
        placeholder: Tensor = self.files.model(rank)["module"][name]
        return self.joined(known, MASTER, rank).to(placeholder.dtype)


def units_of(
    kind: Kind,
    groups: Sequence[Sequence[str]],
    layout: Layout,
    *,
    rank: int,
    replicas: int,
) -> list[tuple[tuple[str, ...], list[Partition]]]:
    """The units of an optimizer of TP rank ``rank``: names, and a partition per replica."""
    sizes = [[(n, layout.parameters[n].numel(rank)) for n in group] for group in groups]
    if not kind.is_partitioned:
        return [((n,), one_parameter(n, numel)) for group in sizes for n, numel in group]
    make = own_partitions if kind.is_stage3 else flat_partitions
    return [(tuple(n for n, _ in group), make(group, replicas)) for group in sizes]


def _count(files: CheckpointFiles, model: Mapping[str, Any], key: str) -> int:
    value = model.get(key)
    if type(value) is not int or not 1 <= value <= _MOST_REPLICAS:
        raise ValueError(
            f"the checkpoint {str(files.folder)!r} says {key}: {shown(value)}, expected an integer "
            f"of 1 to {_MOST_REPLICAS}; load another checkpoint"
        )
    return value


def _kind(files: CheckpointFiles, model: Mapping[str, Any]) -> Kind:
    optimizer = model["optimizer"]
    if isinstance(optimizer, dict):
        if "fp32_groups" in optimizer:
            return Kind("16 bits")
        if "state" in optimizer:
            return Kind("torch")
    elif files.is_stage3:
        return Kind("zero3")
    elif model.get("param_shapes") is not None:
        return Kind("zero" if "zero_stage" in files.optimizer(0, 0) else "bf16")
    raise ValueError(
        f"the checkpoint {str(files.folder)!r} has an optimizer whose states are not known by "
        "parameter, expected one of torch's, with or without ZeRO; load it at the sizes it was "
        "saved at"
    )


def refuse_undescribed(saved: SavedCheckpoint, module: Mapping[str, Any]) -> None:
    """ValueError for tensors among the weights of a rank that no layout describes."""
    buffers = set(saved.files.model(0)["buffer_names"])
    for name, value in module.items():
        known = name in saved.layout.parameters or name in buffers
        if not known and str(name).endswith(BESIDE_4BIT):
            raise ValueError(
                f"{name!r} in the checkpoint is of a weight in 4 bits of bitsandbytes, expected "
                "weights in floating point: shards in 4 bits load at the TP size and by the rules "
                "that they were saved with; save the adapter, and load it into a model that is "
                "sharded otherwise"
            )
        if not known and isinstance(value, Tensor):
            raise ValueError(
                f"{name!r} in the checkpoint is neither a buffer nor a parameter that "
                "tensor_parallel.json describes; load it into the model that was sharded, not "
                "into one around it"
            )
