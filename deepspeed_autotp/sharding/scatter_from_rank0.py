# SPDX-License-Identifier: Apache-2.0
"""From a model whose weights only TP rank 0 has to one that is sharded over all ranks.

TP rank 0 shards one weight after the other for all ranks, scatters the shards and frees the full
weight, so that no other rank ever has a full one. Memory for the shards is allocated before the
first of them is sent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepspeed_autotp._core import Entry, Plan
from deepspeed_autotp.distributed.failure_barrier import failure_barrier
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.distributed.transport import Transport, open_transport
from deepspeed_autotp.native import packing
from deepspeed_autotp.planning.model_description import Description
from deepspeed_autotp.sharding.conversion import Conversion, replace_data
from deepspeed_autotp.sharding.meta_tensors import give_memory
from deepspeed_autotp.state.sharded_model import shard_of, shard_sizes


class ScatterFromRank0(Conversion):
    """A conversion in which every rank but TP rank 0 begins with tensors on the meta device.

    ``source`` is like the device where TP rank 0 has them, and this rank's shards go to ``device``.
    """

    def __init__(
        self,
        description: Description,
        *,
        plan: Plan,
        group: TPGroup,
        overlap: bool,
        source: torch.device,
        device: torch.device,
    ) -> None:
        super().__init__(description, plan=plan, group=group, overlap=overlap)
        self._source = source
        self._device = device

    def switch(self) -> None:
        """As any conversion; before, allocate memory for this rank's tensors in shard shapes."""
        if self._group.rank > 0:
            self._check_memory(self._device)
            for parameter, entry in self._own_entries():
                shape = entry.local_shape(self._group.rank)
                self._undo.append(give_memory(entry.name, parameter, shape, self._device))
            for name, buffer in self._modules[""].named_buffers():
                if buffer.is_meta:
                    self._undo.append(give_memory(name, buffer, buffer.shape, self._device))
        super().switch()

    def check_memory(self, device: torch.device | None) -> None:
        """ValueError where the shards of TP rank 0 do not fit on their device."""
        if self._group.rank == 0 and self._device != self._parameters[0].device:
            self._check_memory(self._device)

    def commit(self, device: torch.device | None = None) -> None:
        """Scatter all weights, and broadcast buffers and the modes of modules. All ranks call it.

        Where a rank fails the others leave with PeerFailed, and no rank has a model any more.
        """
        group, source = self._group, self._source
        with failure_barrier(group), open_transport(group, self._device, via=source) as transport:
            for parameter, entry in self._own_entries():
                if not entry.is_sharded:
                    self._broadcast(parameter)
                    parameter.data = parameter.data.to(self._device)
                else:
                    self._scatter(parameter, entry, transport)
            for buffer in self._modules[""].buffers():
                self._broadcast(buffer)
            self._broadcast_modes()
        if device is not None or self._group.rank > 0:
            self._modules[""].to(self._device)
        torch.clear_autocast_cache()  # it may have copies of the full weights

    def _own_entries(self) -> list[tuple[nn.Parameter, Entry]]:
        """Each parameter once, whatever names it has."""
        pairs = zip(self._parameters, self._plan.entries, strict=True)
        return [(parameter, entry) for parameter, entry in pairs if not entry.is_tied]

    def _scatter(self, parameter: nn.Parameter, entry: Entry, transport: Transport) -> None:
        sizes = shard_sizes(parameter, entry, self._group.size)
        if self._group.rank > 0:
            transport.scatter(None, parameter.data, sizes)
            return
        own = shard_of(parameter.data, entry=entry, rank=0)
        others = [
            _shard_to_send(parameter.data, entry, rank) for rank in range(1, self._group.size)
        ]
        transport.scatter([own, *others], own, sizes)
        replace_data(parameter, own.to(self._device))

    def _broadcast(self, tensor: Tensor) -> None:
        self._group.announce()
        if tensor.numel():
            self._group.broadcast(tensor, via=self._source)

    def _broadcast_modes(self) -> None:
        """Training or evaluation as on TP rank 0, where a loader may have chosen it."""
        modules = list(self._modules.values())
        modes = torch.tensor([module.training for module in modules])
        self._broadcast(modes)
        for module, mode in zip(modules, modes.tolist(), strict=True):
            module.training = mode


def _shard_to_send(full: Tensor, entry: Entry, rank: int) -> Tensor:
    """The shard of ``rank``, which it is sent; a view where its bytes lie one after the other."""
    view = packing.narrow(
        full, view=entry.view, runs=entry.runs(rank), shape=entry.local_shape(rank)
    )
    if view is not None and view.is_contiguous():
        return view
    return shard_of(full, entry=entry, rank=rank)
