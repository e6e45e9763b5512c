# SPDX-License-Identifier: Apache-2.0
"""Parts of tensors from the first rank of a group to all of them, and back.

The parts may be of unequal sizes, or empty, and lie on any device. They travel as bytes, in pieces,
so that what a backend or a copy to its device takes does not grow with a tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp import nccl
from deepspeed_autotp.group import TPGroup

__all__ = ["Carrier", "PointToPoint", "ThroughNccl", "carrier"]

# Bytes that are on their way to or from a rank at once. Over gloo on one host 256 MiB take 0.20 s
# in pieces of 1 MiB, 0.07 s in these, and 0.06 s in pieces of 64 MiB.
_PIECE = 16 << 20


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


class Carrier(ABC):
    """Moves pieces of at most ``piece`` bytes to and from ``place``, where the backend takes them.

    All ranks of the group make the same calls. ValueError on every rank where a part has another
    size in bytes than the tensor that it goes into.
    """

    def __init__(self, group: TPGroup, place: torch.device, *, piece: int = _PIECE) -> None:
        self._group = group
        self._place = place
        self._piece = piece

    def scatter(self, parts: Sequence[Tensor] | None, into: Tensor) -> None:
        """Put ``parts[rank]`` of the first rank into contiguous ``into`` of every rank.

        The other ranks give None. ``into`` may be the first rank's own part itself.
        """
        lanes = self._of_first(parts and [part.contiguous() for part in parts])
        longest = self._agreed_longest(lanes, own=into.nbytes)
        if lanes:
            self._keep(lanes.pop(0), _bytes(into))
            self._move("scatter", lanes, {}, longest)
        else:
            self._move("scatter", {}, {0: _bytes(into)}, longest)

    def gather(self, part: Tensor, into: Sequence[Tensor] | None) -> None:
        """Put ``part`` of every rank into contiguous ``into[rank]`` of the first.

        The other ranks give None.
        """
        lanes = self._of_first(into)
        longest = self._agreed_longest(lanes, own=part.nbytes)
        if lanes:
            self._keep(_bytes(part.contiguous()), lanes.pop(0))
            self._move("gather", {}, lanes, longest)
        else:
            self._move("gather", {0: _bytes(part.contiguous())}, {}, longest)

    def gather_to_all(self, part: Tensor, into: Sequence[Tensor]) -> None:
        """Put ``part`` of every rank into contiguous ``into[rank]`` of every rank."""
        lanes = {rank: _bytes(place) for rank, place in enumerate(into)}
        own = _bytes(part.contiguous())
        longest = self._agreed_longest(lanes, own=part.nbytes)
        self._keep(own, lanes.pop(self._group.rank))
        self._move("gather to all", dict.fromkeys(lanes, own), lanes, longest)

    def _of_first(self, tensors: Sequence[Tensor] | None) -> dict[int, Tensor]:
        """The bytes of the tensor for each rank, which the first rank alone has."""
        expected = self._group.size if self._group.rank == 0 else None
        assert expected == (None if tensors is None else len(tensors))
        return {rank: _bytes(tensor) for rank, tensor in enumerate(tensors or ())}

    def _agreed_longest(self, lanes: Mapping[int, Tensor], *, own: int) -> int:
        """Bytes of the longest part, once all ranks are known to expect the same sizes.

        Where the group has not met yet it does so here; a backend that makes its connections at
        the first call wants all ranks in it, and an empty part moves none of them.
        """
        group = self._group
        mine = torch.full((group.size + 1,), -1, dtype=torch.int64)
        mine[-1] = own
        for rank, data in lanes.items():
            mine[rank] = data.numel()
        said = torch.stack(group.all_gather(mine.to(group.device), [mine.shape] * group.size))
        given: list[int]
        *expected, given = said.T.tolist()
        for rank, sizes in enumerate(zip(*expected, strict=True)):
            if sizes[0] >= 0 and list(sizes) != given:
                raise ValueError(
                    f"rank {rank} of the ranks {list(group.global_ranks)} has parts of "
                    f"{list(sizes)} bytes, but the ranks themselves have {given}; each part needs "
                    "the same size on both"
                )
        return max(given)

    def _keep(self, part: Tensor, into: Tensor) -> None:
        """This rank's own part, unless it is in its place already."""
        if part.data_ptr() != into.data_ptr() or part.device != into.device:
            into.copy_(part)

    def _move(
        self, what: str, out: Mapping[int, Tensor], back: Mapping[int, Tensor], longest: int
    ) -> None:
        """All bytes to and from every peer, all ranks in the same number of pieces."""
        # What takes memory comes first: a rank that has none says so at the step.
        going, coming = self._lanes(out), self._lanes(back)
        for begin in range(0, longest, self._piece):
            self._group.step()
            sent = {lane.peer: lane.load(begin) for lane in going if lane.reaches(begin)}
            arriving = [lane for lane in coming if lane.reaches(begin)]
            received = {lane.peer: lane.room(begin) for lane in arriving}
            if sent or received:
                self._exchange(what, sent, received)
            for lane in arriving:
                lane.unload(begin)

    def _lanes(self, tensors: Mapping[int, Tensor]) -> list[_Lane]:
        lanes = []
        for peer, data in tensors.items():
            size = min(self._piece, data.numel())
            held = None
            if not self._carries(data):
                held = torch.empty(size, dtype=torch.uint8, device=self._place)
            lanes.append(_Lane(peer, data, size, held))
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
    """Bytes to or from a peer, ``size`` at a time; ``held`` is for those that lie elsewhere."""

    peer: int
    data: Tensor
    size: int
    held: Tensor | None

    def reaches(self, begin: int) -> bool:
        return begin < self.data.numel()

    def load(self, begin: int) -> Tensor:
        """The bytes from ``begin`` on, where they can leave."""
        room, piece = self.room(begin), self._piece(begin)
        if self.held is not None:
            room.copy_(piece)
        return room

    def room(self, begin: int) -> Tensor:
        """Where the bytes from ``begin`` on arrive."""
        piece = self._piece(begin)
        return piece if self.held is None else self.held[: piece.numel()]

    def unload(self, begin: int) -> None:
        """Put what arrived into its place."""
        if self.held is not None:
            self._piece(begin).copy_(self.room(begin))

    def _piece(self, begin: int) -> Tensor:
        return self.data[begin : begin + self.size]


class PointToPoint(Carrier):
    """Sends and receives of the group's own backend."""

    def __init__(self, group: TPGroup, *, piece: int = _PIECE) -> None:
        super().__init__(group, group.device, piece=piece)

    def _exchange(
        self, what: str, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]
    ) -> None:
        calls = [self._call(dist.isend, peer, piece) for peer, piece in sent.items()]
        calls += [self._call(dist.irecv, peer, piece) for peer, piece in received.items()]
        for work in dist.batch_isend_irecv(calls):
            work.wait()

    def _call(self, kind: Callable[..., dist.Work | None], peer: int, piece: Tensor) -> dist.P2POp:
        group = self._group
        return dist.P2POp(kind, piece, peer=group.global_ranks[peer], group=group.handle)


class ThroughNccl(Carrier):
    """Sends and receives of a communicator of NCCL's."""

    def __init__(
        self, group: TPGroup, communicator: nccl.Communicator, *, piece: int = _PIECE
    ) -> None:
        super().__init__(group, communicator.device, piece=piece)
        self._communicator = communicator

    def _exchange(
        self, what: str, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]
    ) -> None:
        self._communicator.exchange(what, sent, received)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
