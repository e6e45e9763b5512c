# SPDX-License-Identifier: Apache-2.0
"""The weights of a model into the files of a checkpoint, tensor by tensor.

Each rank of one TP group writes its own shards, or TP rank 0 writes those of all ranks, which it
gathers. Either way private memory has shards only, but for tensors that are computed from others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from deepspeed_autotp._core import Entry
from deepspeed_autotp.checkpoint.weight_files import Computed, OpenFiles, Place, WeightFiles
from deepspeed_autotp.distributed.transport import Transport
from deepspeed_autotp.interop.deepspeed.parameters import gathered_parameters
from deepspeed_autotp.interop.pretrained import reverted
from deepspeed_autotp.native import packing
from deepspeed_autotp.state.sharded_model import TensorParallel, shard_sizes

# A replicated tensor of fewer bytes is written by one rank.
_SMALL = 1 << 20


class WeightWriter:
    """What one rank does for the files of a model.

    ``files`` are those that it writes to, None where it does not. ``transport`` takes shards to TP
    rank 0; None where every rank writes its own, and where this rank takes no part. ``parallel``
    says whether all ranks of the TP group write.
    """

    def __init__(
        self,
        state: TensorParallel | None,
        *,
        files: OpenFiles | None,
        transport: Transport | None,
        parallel: bool,
    ) -> None:
        self._state = state
        self._files = files
        self._transport = transport
        self._rank = 0 if state is None else state.group.rank
        self._ranks = 1 if state is None or not parallel else state.group.size
        self._failure: Exception | None = None

    @torch.no_grad()
    def write(
        self,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        plan: WeightFiles,
        *,
        done: Callable[[int], object],
    ) -> None:
        """Write ``tensors``, the state of ``model`` by its names. All ranks of the run call it.

        ``done`` is told of the bytes of each. A rank that fails goes on to help the others, and
        raises at the end.
        """
        for name, places in plan.places.items():
            # ZeRO 3 gathers a weight over all data-parallel ranks, wherever it is kept.
            with gathered_parameters([tensors[name]]):
                self._write(tensors[name], places)
            done(sum(place.nbytes for place in places))
        for computed in plan.computed:
            self._compute(model, tensors, computed)
        if self._failure is not None:
            raise self._failure

    def _write(self, tensor: Tensor, places: Sequence[Place]) -> None:
        entry = None if self._state is None else self._state.entry(tensor)
        if entry is None or not entry.is_sharded:
            self._attempt(lambda: self._put_replicated(tensor, places))
        elif self._ranks > 1:
            self._attempt(lambda: self._put(tensor.detach(), entry, self._rank, places))
        else:
            shards = self._gather(tensor, entry)
            self._attempt(lambda: self._put_all(shards, entry, places))

    def _gather(self, tensor: Tensor, entry: Entry) -> Sequence[Tensor]:
        """The shards of all ranks on TP rank 0, those of the others on the CPU."""
        if self._transport is None or self._state is None:
            return ()
        shard = tensor.detach().contiguous()
        sizes = shard_sizes(shard, entry, self._state.group.size)
        if self._rank:
            self._transport.gather(shard, None, sizes)
            return ()
        shapes = [entry.local_shape(rank) for rank in range(1, self._state.group.size)]
        into = [shard, *(torch.empty(shape, dtype=shard.dtype) for shape in shapes)]
        self._transport.gather(shard, into, sizes)
        return into

    def _put_all(self, shards: Sequence[Tensor], entry: Entry, places: Sequence[Place]) -> None:
        for rank, shard in enumerate(shards):
            self._put(shard, entry, rank, places)

    def _put(self, shard: Tensor, entry: Entry, rank: int, places: Sequence[Place]) -> None:
        """Write what of the shard of ``rank`` belongs to ``places``."""
        if self._files is None or shard.numel() == 0:
            return
        on_cpu = shard.to("cpu").contiguous()
        for place in places:
            packing.unpack_part_(
                self._files.part(place),
                on_cpu,
                view=entry.view,
                runs=entry.runs(rank),
                begin=place.begin,
            )

    def _put_replicated(self, tensor: Tensor, places: Sequence[Place]) -> None:
        """Write this rank's share of a tensor that all ranks have."""
        if self._files is None:
            return
        data = _bytes(tensor)
        for place in places:
            begin, end = 0, place.nbytes
            if end >= _SMALL:
                begin, end = (end * rank // self._ranks for rank in (self._rank, self._rank + 1))
            elif self._rank:
                continue
            source = data[place.begin + begin : place.begin + end]
            self._files.part(place)[begin:end].copy_(source)

    def _compute(self, model: nn.Module, tensors: Mapping[str, Tensor], computed: Computed) -> None:
        """Write on TP rank 0 what is computed from full tensors."""
        full: dict[str, Tensor] = {}
        for name in computed.sources:
            with gathered_parameters([tensors[name]]):
                found = self._full(tensors[name])
            if found is not None:
                full[name] = found
        if self._files is not None and not self._rank:
            self._attempt(lambda: self._put_computed(reverted(model, full), computed))

    def _full(self, tensor: Tensor) -> Tensor | None:
        entry = None if self._state is None else self._state.entry(tensor)
        if self._state is None or entry is None or not entry.is_sharded:
            return tensor.detach().to("cpu", copy=True) if self._rank == 0 else None
        if self._transport is None:
            return None
        return self._state.gather_to_cpu(
            tensor, entry=entry, transport=self._transport, all_ranks=False
        )

    def _put_computed(self, results: Mapping[str, Tensor], computed: Computed) -> None:
        assert self._files is not None
        for name, place in computed.places.items():
            self._files.part(place).copy_(_bytes(results[name]))

    def _attempt(self, work: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                work()
            except Exception as error:
                self._failure = error


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
