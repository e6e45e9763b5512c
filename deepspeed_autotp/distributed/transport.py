# SPDX-License-Identifier: Apache-2.0
"""Parts of tensors from the first rank of a group to all of them, and back.

The parts may be of unequal sizes, or empty, and lie on any device. They travel as bytes, in chunks,
so that what a backend or a copy to its device takes does not grow with a tensor.
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

__all__ = ["Carrier", "Kind", "PointToPoint", "ThroughNccl", "carrier"]

# Bytes that are on their way to or from a rank at once. Over gloo on one host 256 MiB take 0.20 s
# in chunks of 1 MiB, 0.07 s in these, and 0.06 s in chunks of 64 MiB.
_CHUNK = 16 << 20
# Parts of at most this many bytes are gathered by all ranks at once, whoever needs them: a message
# to each takes longer than the bytes do.
_SMALL = 64 << 10


@contextmanager
def carrier(group: TPGroup, place: torch.device) -> Iterator[Carrier]:
    """What moves parts between the ranks of ``group``, which all enter and leave together.

    ``place`` is where a rank has its own part. NCCL moves between GPUs, each of another rank;
    where some rank cannot use it, the group's own backend does.
    """
    communicator = nccl.connect(group, place)
    if communicator is None:
        yield PointToPoint(group)
        return
    try:
        yield ThroughNccl(group, communicator)
    finally:
        communicator.close()


@dataclass(frozen=True, slots=True)
class Kind:
    """What the ranks know alike of the parts of a tensor: its name, and their bytes by rank."""

    name: str
    sizes: tuple[int, ...]

    def check(self, tensor: Tensor, rank: int) -> None:
        """ValueError unless ``tensor`` is as large as the part of ``rank``."""
        if tensor.nbytes != self.sizes[rank]:
            raise ValueError(
                f"{self.name}: the part of rank {rank} of {len(self.sizes)} has {tensor.nbytes} "
                f"bytes ({tensor.dtype}), expected {self.sizes[rank]}; its shape or data type was "
                "changed after the model was sharded"
            )


class Carrier(ABC):
    """Moves chunks of at most ``chunk`` bytes to and from ``place``, where the backend takes them.

    All ranks of the group make the same calls; where they are in lockstep, ranks that differ in
    the kind of the parts all get an error. ValueError for a part of another size.
    """

    def __init__(self, group: TPGroup, place: torch.device, *, chunk: int = _CHUNK) -> None:
        self._group = group
        self._place = place
        self._chunk = chunk

    def scatter(self, parts: Sequence[Tensor] | None, into: Tensor, kind: Kind) -> None:
        """Put ``parts[rank]`` of the first rank into contiguous ``into`` of every rank.

        The other ranks give None. ``into`` may be the first rank's own part itself.
        """
        kind.check(into, self._group.rank)
        if parts is None:
            self._move("scatter", {}, {0: _bytes(into)}, kind)
            return
        lanes = self._by_rank([part.contiguous() for part in parts], kind)
        _keep(lanes.pop(0), _bytes(into))
        self._move("scatter", lanes, {}, kind)

    def gather(self, part: Tensor, into: Sequence[Tensor] | None, kind: Kind) -> None:
        """Put ``part`` of every rank into contiguous ``into[rank]`` of the first.

        The other ranks give None.
        """
        own, lanes = self._own(part, kind), self._by_rank(into or (), kind)
        _keep(own, lanes.pop(0, own))
        self._collect("gather", own, [0] if self._group.rank else [], lanes, kind)

    def gather_to_all(self, part: Tensor, into: Sequence[Tensor], kind: Kind) -> None:
        """Put ``part`` of every rank into contiguous ``into[rank]`` of every rank."""
        own, lanes = self._own(part, kind), self._by_rank(into, kind)
        _keep(own, lanes.pop(self._group.rank))
        self._collect("gather to all", own, list(lanes), lanes, kind)

    def _collect(
        self, what: str, own: Tensor, to: Sequence[int], back: Mapping[int, Tensor], kind: Kind
    ) -> None:
        """Send this rank's part to those that want it, and put theirs into ``back``."""
        self._move(what, dict.fromkeys(to, own), back, kind)

    def _own(self, part: Tensor, kind: Kind) -> Tensor:
        kind.check(part, self._group.rank)
        return _bytes(part.contiguous())

    def _by_rank(self, tensors: Sequence[Tensor], kind: Kind) -> dict[int, Tensor]:
        """The bytes of the tensor for each rank."""
        for rank, tensor in enumerate(tensors):
            kind.check(tensor, rank)
        return {rank: _bytes(tensor) for rank, tensor in enumerate(tensors)}

    def _move(
        self, what: str, out: Mapping[int, Tensor], back: Mapping[int, Tensor], kind: Kind
    ) -> None:
        """All bytes to and from every peer, all ranks in the same number of chunks."""
        # What takes memory comes first: a rank that has none says so at the step.
        going, coming = self._lanes(out), self._lanes(back)
        for begin in range(0, max(kind.sizes), self._chunk):
            self._group.step(_words(what, kind))
            sent = _by_peer((lane, lane.load(begin)) for lane in going)
            received = _by_peer((lane, lane.room(begin)) for lane in coming)
            if sent or received:
                self._exchange(what, sent, received)
            for lane in coming:
                lane.unload(begin)

    def _lanes(self, tensors: Mapping[int, Tensor]) -> list[_Lane]:
        """One for each tensor, which may go to several peers."""
        peers: dict[int, list[int]] = {}
        for peer, data in tensors.items():
            peers.setdefault(id(data), []).append(peer)
        lanes = []
        for those in peers.values():
            data = tensors[those[0]]
            size = min(self._chunk, data.numel())
            held = None
            if not self._carries(data):
                held = torch.empty(size, dtype=torch.uint8, device=self._place)
            lanes.append(_Lane(those, data, size, held))
        return lanes

    def _carries(self, data: Tensor) -> bool:
        """Whether the backend takes ``data`` where it lies."""
        same_type = data.device.type == self._place.type
        return same_type and self._place.index in (None, data.device.index)

    @abstractmethod
    def _exchange(
        self, what: str, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]
    ) -> None:
        """Send and receive at once, each to or from the rank that is its key; ``what`` for errors.

        Done when it returns, or in order on the current stream.
        """


@dataclass(frozen=True, slots=True)
class _Lane:
    """Bytes to or from peers, ``size`` at a time; ``held`` is for those that lie elsewhere."""

    peers: Sequence[int]
    data: Tensor
    size: int
    held: Tensor | None

    def load(self, begin: int) -> Tensor:
        """The bytes from ``begin`` on, where they can leave."""
        room = self.room(begin)
        if self.held is not None:
            room.copy_(self._chunk(begin))
        return room

    def room(self, begin: int) -> Tensor:
        """Where the bytes from ``begin`` on arrive."""
        chunk = self._chunk(begin)
        return chunk if self.held is None else self.held[: chunk.numel()]

    def unload(self, begin: int) -> None:
        """Put what arrived into its place."""
        if self.held is not None:
            self._chunk(begin).copy_(self.room(begin))

    def _chunk(self, begin: int) -> Tensor:
        return self.data[begin : begin + self.size]


class PointToPoint(Carrier):
    """Sends and receives of the group's own backend."""

    def __init__(self, group: TPGroup, *, chunk: int = _CHUNK) -> None:
        super().__init__(group, group.device, chunk=chunk)

    def _collect(
        self, what: str, own: Tensor, to: Sequence[int], back: Mapping[int, Tensor], kind: Kind
    ) -> None:
        longest = max(kind.sizes)
        if not 0 < longest <= _SMALL:
            super()._collect(what, own, to, back, kind)
            return
        sent = own.new_zeros(longest, device=self._place)
        sent[: own.numel()].copy_(own)
        received = sent.new_empty(self._group.size, longest)
        self._group.step(_words(what, kind))
        self._group.gather(sent, into=received)
        for rank, data in back.items():
            data.copy_(received[rank, : data.numel()])

    def _exchange(
        self, what: str, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]
    ) -> None:
        calls = [self._call(dist.isend, peer, chunk) for peer, chunk in sent.items()]
        calls += [self._call(dist.irecv, peer, chunk) for peer, chunk in received.items()]
        try:
            for work in dist.batch_isend_irecv(calls):
                work.wait()
        except RuntimeError as error:
            raise RuntimeError(
                f"{what} between the ranks {list(self._group.global_ranks)} has failed on rank "
                f"{self._group.rank} of them; another one has ended, or has failed and says why: "
                + str(error).partition("\n")[0]
            ) from error

    def _call(self, kind: Callable[..., dist.Work | None], peer: int, chunk: Tensor) -> dist.P2POp:
        group = self._group
        return dist.P2POp(kind, chunk, peer=group.global_ranks[peer], group=group.handle)


class ThroughNccl(Carrier):
    """Sends and receives of a communicator of NCCL's."""

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


def _words(what: str, kind: Kind) -> str:
    return f"{what} of {kind.name}, {list(kind.sizes)} bytes by rank"


def _keep(part: Tensor, into: Tensor) -> None:
    """A rank's own part, unless it is in its place already."""
    if part.data_ptr() != into.data_ptr() or part.device != into.device:
        into.copy_(part)


def _by_peer(chunks: Iterable[tuple[_Lane, Tensor]]) -> dict[int, Tensor]:
    """What goes to or comes from each peer, where that is anything."""
    return {peer: chunk for lane, chunk in chunks if chunk.numel() for peer in lane.peers}
