# SPDX-License-Identifier: Apache-2.0
"""From a model without values to one that is sharded: each rank reads its own shards from files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from deepspeed_autotp._core import Entry, Plan
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.progress_bars import progress_bar
from deepspeed_autotp.loading.file_weights import FileWeights
from deepspeed_autotp.loading.read_plan import ReadPlan, Target
from deepspeed_autotp.loading.slices import own_slices
from deepspeed_autotp.native.file_reads import OpenFiles
from deepspeed_autotp.planning.model_description import Description
from deepspeed_autotp.sharding.conversion import Conversion
from deepspeed_autotp.sharding.meta_tensors import give_memory
from deepspeed_autotp.state.sharded_model import shard_of

_log = logging.getLogger("deepspeed_autotp")


class LoadShards(Conversion):
    """A conversion in which every rank begins with tensors on the meta device.

    This rank's shards go to ``device``.
    """

    def __init__(
        self,
        description: Description,
        *,
        plan: Plan,
        group: TPGroup,
        overlap: bool,
        weights: FileWeights,
        device: torch.device,
    ) -> None:
        super().__init__(description, plan=plan, group=group, overlap=overlap)
        self._weights = weights
        self._device = device
        self._values: list[tuple[Tensor, Tensor]] = []
        self._reads = ReadPlan(())

    def switch(self) -> None:
        """As any conversion; before, plan what is read, and allocate memory for this rank's tensors
        in shard shapes."""
        self._check_memory(self._device)
        targets: list[Target] = []
        own = list(self._own_tensors())
        for tensor, entry, _ in own:
            targets += self._targets(tensor, entry)
        self._reads = ReadPlan(targets, to_device=self._device.type != "cpu")
        for tensor, entry, name in own:
            self._undo.append(give_memory(name, tensor, self._shape(tensor, entry), self._device))
        super().switch()

    def check_memory(self, device: torch.device | None) -> None:
        """Nothing: ``switch`` has allocated it."""

    @torch.no_grad()
    def commit(self, device: torch.device | None = None) -> None:
        """Read all shards; what the checkpoint does not have takes the values of transformers."""
        _log.info("this rank reads %s", self._reads)
        with OpenFiles() as files, self._progress() as advance:
            self._reads.run(files, advance)
        for tensor, value in self._values:
            tensor.detach().copy_(value)
        self._modules[""].to(self._device)
        torch.clear_autocast_cache()

    def _progress(self) -> AbstractContextManager[Callable[[int], object]]:
        is_shown = self._group.global_ranks[0] == 0 and self._group.rank == 0
        return progress_bar(self._reads.bytes_to_read if is_shown else None)

    def _targets(self, tensor: Tensor, entry: Entry | None) -> Iterator[Target]:
        """What is read into a tensor; its value, where that is there, is put aside."""
        rank = self._group.rank
        origin, value = self._weights.origin(tensor), self._weights.values.get(id(tensor))
        if value is not None:
            if entry is not None and entry.is_sharded:
                value = shard_of(value, entry=entry, rank=rank)
            self._values.append((tensor, value))
        elif origin is not None:
            shape = self._shape(tensor, entry)
            for each in own_slices(origin, entry, rank, shape, tensor.dtype):
                yield each, tensor

    def _shape(self, tensor: Tensor, entry: Entry | None) -> tuple[int, ...]:
        return tuple(tensor.shape) if entry is None else entry.local_shape(self._group.rank)

    def _own_tensors(self) -> Iterator[tuple[Tensor, Entry | None, str]]:
        """Each parameter once, whatever names it has, and the buffers of the checkpoint."""
        for parameter, entry in zip(self._parameters, self._plan.entries, strict=True):
            if not entry.is_tied:
                yield parameter, entry, entry.name
        for name, buffer in self._modules[""].named_buffers():
            if buffer.is_meta:
                yield buffer, None, name
