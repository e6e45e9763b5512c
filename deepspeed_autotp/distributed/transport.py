# SPDX-License-Identifier: Apache-2.0
"""Scatter, gather and all-gather of shards over a TP group, point to point and in chunks.

Shards may have different sizes or be empty, and be on any device. They are sent as bytes, chunk by
chunk, so that the memory a backend or a copy to its device takes does not grow with a tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp.distributed import nccl
from deepspeed_autotp.distributed.process_group import TPGroup

__all__ = ["NcclTransport", "ProcessGroupTransport", "ShardSizes", "Transport", "open_transport"]

# Bytes in flight to or from a rank at once. Over gloo on one machine 256 MiB take 0.20 s in chunks
# of 1 MiB, 0.07 s in these, and 0.06 s in chunks of 64 MiB.
_CHUNK = 16 << 20
# Shards of at most this many bytes are all-gathered at once, also where one rank needs them: a
# message to each rank takes longer than the bytes do.
_SMALL = 64 << 10


@contextmanager
def open_transport(
    group: TPGroup, device: torch.device, *, via: torch.device | None = None
) -> Iterator[Transport]:
    """The transport between the ranks of ``group``, which all enter and leave together.

    ``device`` is where this rank has its shards. NCCL moves them between GPUs, each of another
    rank; where some rank cannot use it, the group's own backend does, on ``via``: a device of one
    type on all ranks, as ``device`` has to be without it.
    """
    communicator = nccl.connect(group, device)
    if communicator is None:
        yield ProcessGroupTransport(group, device if via is None else via)
        return
    try:
        yield NcclTransport(group, communicator)
    finally:
        communicator.close()


@dataclass(frozen=True, slots=True)
class ShardSizes:
    """What all ranks know of the shards of a tensor: its name, and their bytes by rank."""

    name: str
    nbytes: tuple[int, ...]

    def check(self, shard: Tensor, rank: int) -> None:
        """ValueError unless ``shard`` is as large as that of ``rank``."""
        if shard.nbytes != self.nbytes[rank]:
            raise ValueError(
                f"{self.name}: the shard of rank {rank} of {len(self.nbytes)} has {shard.nbytes} "
                f"bytes ({shard.dtype}), expected {self.nbytes[rank]}; its shape or dtype was "
                "changed after the model was sharded"
            )


class Transport(ABC):
    """Sends chunks of at most ``chunk`` bytes; ``device`` is where the backend needs them.

    All ranks of the group make the same calls; under a failure barrier, ranks that differ in the
    sizes all get an error. ValueError for a shard of another size.
    """

    def __init__(self, group: TPGroup, device: torch.device, *, chunk: int = _CHUNK) -> None:
        self._group = group
        self._device = device
        self._chunk = chunk

    def scatter(self, shards: Sequence[Tensor] | None, into: Tensor, sizes: ShardSizes) -> None:
        """Put ``shards[rank]`` of TP rank 0 into contiguous ``into`` of every rank.

        The other ranks give None. ``into`` may be TP rank 0's own shard itself.
        """
        sizes.check(into, self._group.rank)
        if shards is None:
            self._transfer("scatter", {}, {0: _bytes(into)}, sizes)
            return
        outgoing = self._by_rank([shard.contiguous() for shard in shards], sizes)
        _copy_local(outgoing.pop(0), _bytes(into))
        self._transfer("scatter", outgoing, {}, sizes)

    def gather(self, shard: Tensor, into: Sequence[Tensor] | None, sizes: ShardSizes) -> None:
        """Put ``shard`` of every rank into contiguous ``into[rank]`` of TP rank 0.

        The other ranks give None.
        """
        local, incoming = self._local(shard, sizes), self._by_rank(into or (), sizes)
        _copy_local(local, incoming.pop(0, local))
        self._gather("gather", local, [0] if self._group.rank else [], incoming, sizes)

    def all_gather(self, shard: Tensor, into: Sequence[Tensor], sizes: ShardSizes) -> None:
        """Put ``shard`` of every rank into contiguous ``into[rank]`` of every rank."""
        local, incoming = self._local(shard, sizes), self._by_rank(into, sizes)
        _copy_local(local, incoming.pop(self._group.rank))
        self._gather("all-gather", local, list(incoming), incoming, sizes)

    def _gather(
        self,
        what: str,
        local: Tensor,
        receivers: Sequence[int],
        incoming: Mapping[int, Tensor],
        sizes: ShardSizes,
    ) -> None:
        """Send this rank's shard to ``receivers``, and fill ``incoming`` from its ranks."""
        self._transfer(what, dict.fromkeys(receivers, local), incoming, sizes)

    def _local(self, shard: Tensor, sizes: ShardSizes) -> Tensor:
        sizes.check(shard, self._group.rank)
        return _bytes(shard.contiguous())

    def _by_rank(self, tensors: Sequence[Tensor], sizes: ShardSizes) -> dict[int, Tensor]:
        """The bytes of the tensor for each rank."""
        for rank, tensor in enumerate(tensors):
            sizes.check(tensor, rank)
        return {rank: _bytes(tensor) for rank, tensor in enumerate(tensors)}

    def _transfer(
        self,
        what: str,
        outgoing: Mapping[int, Tensor],
        incoming: Mapping[int, Tensor],
        sizes: ShardSizes,
    ) -> None:
        """All bytes to and from every peer, all ranks in the same number of chunks."""
        # Memory is taken first: a rank that has none reports so at the announcement.
        out_buffers, in_buffers = self._buffers(outgoing), self._buffers(incoming)
        for begin in range(0, max(sizes.nbytes), self._chunk):
            self._group.announce(_description(what, sizes))
            sent = _by_peer((buffer, buffer.load(begin)) for buffer in out_buffers)
            received = _by_peer((buffer, buffer.chunk(begin)) for buffer in in_buffers)
            if sent or received:
                self._exchange(what, sent, received)
            for buffer in in_buffers:
                buffer.store(begin)

    def _buffers(self, tensors: Mapping[int, Tensor]) -> list[_Buffer]:
        """One for each tensor, which may go to several peers."""
        peers: dict[int, list[int]] = {}
        for peer, data in tensors.items():
            peers.setdefault(id(data), []).append(peer)
        buffers = []
        for receivers in peers.values():
            data = tensors[receivers[0]]
            size = min(self._chunk, data.numel())
            staging = None
            if not self._is_reachable(data):
                staging = torch.empty(size, dtype=torch.uint8, device=self._device)
            buffers.append(_Buffer(receivers, data, size, staging))
        return buffers

    def _is_reachable(self, data: Tensor) -> bool:
        """Whether the backend can use ``data`` without a copy to another device."""
        same_type = data.device.type == self._device.type
        return same_type and self._device.index in (None, data.device.index)

    @abstractmethod
    def _exchange(
        self, what: str, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]
    ) -> None:
        """Send and receive at once, each to or from the rank that is its key; ``what`` for errors.

        Complete when it returns, or in order on the current stream.
        """


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Bytes to or from peers, ``size`` at a time, through ``staging`` for another device."""

    peers: Sequence[int]
    data: Tensor
    size: int
    staging: Tensor | None

    def load(self, begin: int) -> Tensor:
        """The chunk from byte ``begin`` on, ready to be sent."""
        chunk = self.chunk(begin)
        if self.staging is not None:
            chunk.copy_(self._data_chunk(begin))
        return chunk

    def chunk(self, begin: int) -> Tensor:
        """Memory for the chunk from byte ``begin`` on that the backend reaches."""
        chunk = self._data_chunk(begin)
        return chunk if self.staging is None else self.staging[: chunk.numel()]

    def store(self, begin: int) -> None:
        """Copy a chunk that was received to where it belongs."""
        if self.staging is not None:
            self._data_chunk(begin).copy_(self.chunk(begin))

    def _data_chunk(self, begin: int) -> Tensor:
        return self.data[begin : begin + self.size]


class ProcessGroupTransport(Transport):
    """Sends and receives of the group's own backend for ``device``."""

    def __init__(self, group: TPGroup, device: torch.device, *, chunk: int = _CHUNK) -> None:
        super().__init__(group, group.point_to_point_device(device), chunk=chunk)

    def _gather(
        self,
        what: str,
        local: Tensor,
        receivers: Sequence[int],
        incoming: Mapping[int, Tensor],
        sizes: ShardSizes,
    ) -> None:
        longest = max(sizes.nbytes)
        if not 0 < longest <= _SMALL:
            super()._gather(what, local, receivers, incoming, sizes)
            return
        sent = local.new_zeros(longest, device=self._device)
        sent[: local.numel()].copy_(local)
        received = sent.new_empty(self._group.size, longest)
        self._group.announce(_description(what, sizes))
        self._group.all_gather_into(sent, into=received)
        for rank, data in incoming.items():
            data.copy_(received[rank, : data.numel()])

    def _exchange(
        self, what: str, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]
    ) -> None:
        calls = [self._p2p(dist.isend, peer, chunk) for peer, chunk in sent.items()]
        calls += [self._p2p(dist.irecv, peer, chunk) for peer, chunk in received.items()]
        try:
            for work in dist.batch_isend_irecv(calls):
                work.wait()
        except RuntimeError as error:
            raise RuntimeError(
                f"{what} between the ranks {list(self._group.global_ranks)} failed on rank "
                f"{self._group.rank} of them; another rank has ended, or has failed and its own "
                "error says why: " + str(error).partition("\n")[0]
            ) from error

    def _p2p(self, op: Callable[..., dist.Work | None], peer: int, chunk: Tensor) -> dist.P2POp:
        group, handle = self._group, self._group.handle_for(chunk.device)
        return dist.P2POp(op, chunk, peer=group.global_ranks[peer], group=handle)


class NcclTransport(Transport):
    """Sends and receives of an NCCL communicator."""

    def __init__(
        self, group: TPGroup, communicator: nccl.Communicator, *, chunk: int = _CHUNK
    ) -> None:
        super().__init__(group, communicator.device, chunk=chunk)
        self._communicator = communicator

    def _exchange(
        self, what: str, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]
    ) -> None:
        self._communicator.exchange(what, sent, received)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)


def _description(what: str, sizes: ShardSizes) -> str:
    return f"{what} of {sizes.name}, {list(sizes.nbytes)} bytes by rank"


def _copy_local(shard: Tensor, into: Tensor) -> None:
    """A rank's own shard, unless it is in its place already."""
    if shard.data_ptr() != into.data_ptr() or shard.device != into.device:
        into.copy_(shard)


def _by_peer(chunks: Iterable[tuple[_Buffer, Tensor]]) -> dict[int, Tensor]:
    """The chunk for each peer, without empty ones."""
    return {peer: chunk for buffer, chunk in chunks if chunk.numel() for peer in buffer.peers}
